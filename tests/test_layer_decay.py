"""Learning-rate decay layer by layer, over the list of layer groups that freezing uses."""

import pytest
import torch
from helpers import EVERY_FEATURE_MODE, pixels, tiny_config
from torch import nn
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.training.optimization import layer_decay_groups


class PageClassifier(nn.Module):
    """An encoder with a head of its own."""

    def __init__(self, encoder: DeepSeekOCRVisionModel):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, pixel_values, labels):
        logits = self.head(self.encoder(pixel_values).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rate_of(groups: list[dict], parameter: nn.Parameter) -> float:
    (rate,) = [group["lr"] for group in groups if any(member is parameter for member in group["params"])]
    return rate


def weight_decay_of(groups: list[dict], parameter: nn.Parameter) -> float:
    (decay,) = [group["weight_decay"] for group in groups if any(member is parameter for member in group["params"])]
    return decay


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_every_trainable_parameter_is_there_exactly_once(feature_mode):
    """Pins a parameter that no optimizer moves, or that two groups move."""
    model = PageClassifier(DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)))
    groups = layer_decay_groups(model, learning_rate=1e-3, layer_decay=0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))


def test_the_rate_falls_by_one_factor_a_layer_group_and_the_rest_keeps_it():
    """Pins the direction, and that a head has the full rate."""
    model = PageClassifier(DeepSeekOCRVisionModel(tiny_config()))
    groups = layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5)
    layers = model.encoder.layer_groups()
    for depth, parameters in enumerate(layers.values()):
        assert {rate_of(groups, parameter) for parameter in parameters} == {0.5 ** (len(layers) - depth)}
    assert rate_of(groups, model.head.weight) == rate_of(groups, model.head.bias) == 1.0
    names = {group["name"] for group in groups}
    assert names == {f"encoder.{name}" for name in layers} | {"other"}


def test_an_encoder_alone_decays_as_it_does_in_a_composite():
    """Pins rates that would change when a head is put on."""
    model = PageClassifier(DeepSeekOCRVisionModel(tiny_config()))
    alone = layer_decay_groups(model.encoder, learning_rate=1.0, layer_decay=0.5)
    inside = layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5)
    for parameter in model.encoder.parameters():
        assert rate_of(alone, parameter) == rate_of(inside, parameter)
    assert {group["name"] for group in alone} == set(model.encoder.layer_groups())


def test_frozen_parameters_are_left_out():
    """Pins weight decay on what is frozen, and memory for its moments."""
    model = DeepSeekOCRVisionModel(tiny_config())
    model.freeze("sam", "clip.layers.0")
    groups = layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5)
    assert {group["name"] for group in groups} == {"clip.embeddings", "clip.layers.1"}
    # What is frozen still counts as a layer between.
    assert rate_of(groups, model.vision_model.pre_layrnorm.weight) == 0.5**3
    assert layer_decay_groups(model.freeze(), learning_rate=1.0, layer_decay=0.5) == []


def test_biases_norms_single_tokens_and_tables_of_positions_have_no_weight_decay():
    """Pins tables that weight decay pulls to nothing."""
    model = PageClassifier(DeepSeekOCRVisionModel(tiny_config(feature_mode="projected")))
    groups = layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.3)
    for name, parameter in model.named_parameters():
        is_table = any(part in name for part in ("pos_embed", "rel_pos", "position_embedding"))
        is_vector = parameter.ndim == 1
        assert weight_decay_of(groups, parameter) == (0.0 if is_table or is_vector else 0.3), name
    assert weight_decay_of(groups, model.encoder.vision_model.embeddings.class_embedding) == 0.0
    assert weight_decay_of(groups, model.encoder.sam_model.net_2.weight) == 0.3


def test_a_parametrised_table_of_positions_has_no_weight_decay_either():
    """Pins a choice by the end of a parameter's name, which a parametrization and a second owner change."""
    encoder = DeepSeekOCRVisionModel(tiny_config())
    attention, clip = encoder.sam_model.blocks[0].attn, encoder.vision_model
    for module, name in ((attention, "rel_pos_h"), (encoder.sam_model, "pos_embed")):
        nn.utils.parametrize.register_parametrization(module, name, nn.Identity())
    model = nn.ModuleDict()
    model["a reader that shares a table"] = nn.ParameterList([clip.embeddings.position_embedding.weight])
    model["encoder"] = encoder
    groups = layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.3)
    assert weight_decay_of(groups, attention.parametrizations.rel_pos_h.original) == 0.0
    assert weight_decay_of(groups, clip.embeddings.position_embedding.weight) == 0.0
    assert weight_decay_of(groups, attention.qkv.weight) == 0.3
    original = encoder.sam_model.parametrizations.pos_embed.original
    assert weight_decay_of(groups, original) == 0.0
    assert rate_of(groups, original) == rate_of(groups, encoder.sam_model.patch_embed.proj.weight) == 0.5**8


def test_an_optimizer_moves_the_first_layers_least():
    """Pins groups that an optimizer takes and does not heed."""
    model = PageClassifier(DeepSeekOCRVisionModel(tiny_config()))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = layer_decay_groups(model, learning_rate=1e-2, layer_decay=0.5, weight_decay=0.0)
    optimizer = torch.optim.Adam(groups)
    model(pixels(), torch.tensor([0, 1]))["loss"].backward()
    optimizer.step()
    # Adam's first step is as long as the rate, wherever the gradient is not tiny.
    for name, rate in (
        ("encoder.sam_model.patch_embed.proj.weight", 1e-2 * 0.5**8),
        ("encoder.vision_model.transformer.layers.1.mlp.fc2.weight", 1e-2 * 0.5),
        ("head.weight", 1e-2),
    ):
        assert (model.get_parameter(name) - start[name]).abs().max().item() == pytest.approx(rate, rel=1e-2), name


def test_trainer_and_a_schedule_keep_the_ratios_of_the_rates(tmp_path):
    """Pins `Trainer(optimizers=(optimizer, None))`, whose schedule scales every group alike."""
    model = PageClassifier(DeepSeekOCRVisionModel(tiny_config()))
    optimizer = torch.optim.AdamW(layer_decay_groups(model, learning_rate=1e-3, layer_decay=0.5))
    rows = [{"pixel_values": pixels(1)[0], "labels": torch.tensor(label)} for label in (0, 1, 0, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        lr_scheduler_type="linear",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    start = model.encoder.sam_model.pos_embed.detach().clone()
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert not torch.equal(model.encoder.sam_model.pos_embed, start)
    initial = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert initial["other"] == 1e-3
    assert initial["encoder.sam.patch_embed"] == 1e-3 * 0.5**8


def test_a_schedule_scales_all_rates_alike():
    """Pins warm-up and decay over time on top of the decay over layers."""
    model = DeepSeekOCRVisionModel(tiny_config())
    optimizer = torch.optim.SGD(layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=8)
    optimizer.step()
    schedule.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0; it has to be a finite number above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
        ({"layer_decay": 0.0}, "`layer_decay` is 0.0; it has to be a finite number.* at most 1.* above 0"),
        ({"layer_decay": 1.5}, "`layer_decay` is 1.5"),
        ({"weight_decay": -0.1}, "`weight_decay` is -0.1; it has to be a finite number of at least 0"),
    ],
)
def test_values_out_of_range_are_errors_that_name_them(tiny_model, arguments, message):
    """Pins a percentage given as 75, and signs."""
    with pytest.raises(ValueError, match=message):
        layer_decay_groups(tiny_model, **({"learning_rate": 1e-3, "layer_decay": 0.9} | arguments))


def test_a_model_without_an_encoder_is_an_error():
    """Pins a decay that decays nothing, and what is no model at all."""
    with pytest.raises(ValueError, match="a Linear, contains no DeepSeekOCRVisionModel"):
        layer_decay_groups(nn.Linear(2, 2), learning_rate=1e-3, layer_decay=0.9)
    with pytest.raises(TypeError, match="got a list"):
        layer_decay_groups([], learning_rate=1e-3, layer_decay=0.9)
