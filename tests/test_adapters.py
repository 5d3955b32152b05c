"""LoRA by peft: what is adapted, that it learns, and that merging, saving and writing back keep it."""

import inspect
import re

import pytest
import torch
from helpers import ROOT, assert_same_weights, pixels, relative_error, released_tensors, tiny_config, write_checkpoint
from torch import nn
from transformers import (
    AutoModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.training.adapters import LORA_TARGETS
from deepseek_ocr_vision.training.optimization import layer_decay_groups


peft = pytest.importorskip("peft", reason="peft is not installed")

EVERYTHING = [name for names in LORA_TARGETS.values() for name in names]
# With a B that is not zero, as it is before the first step, every adapter gets a gradient.
RANDOM = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}


def adapted(model: nn.Module, targets: list[str], **options) -> "peft.PeftModel":
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **(RANDOM | options)))


def targeted(model: "peft.PeftModel") -> set[str]:
    return {
        name
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def llava(text_config: PreTrainedConfig, feature_mode: str = "residual") -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=tiny_config(feature_mode=feature_mode),
        text_config=text_config,
        image_token_index=9,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def text_config(config_class: type[PreTrainedConfig] = LlamaConfig, **fields) -> PreTrainedConfig:
    sizes = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    sizes |= {"intermediate_size": 24, "num_key_value_heads": 2}
    return config_class(**(sizes | fields))


def llava_row(answer: int) -> dict[str, torch.Tensor]:
    """A page, which is four tokens, a question and an answer."""
    input_ids = torch.tensor([1, 9, 9, 9, 9, 2, answer])
    labels = input_ids.where(torch.arange(7) == 6, torch.tensor(-100))
    return {"pixel_values": pixels(1)[0], "input_ids": input_ids, "labels": labels}


def train(model: nn.Module, rows: list[dict], folder, **options) -> Trainer:
    """Two steps of `Trainer`, saved."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer


# What is adapted


@pytest.mark.parametrize("inside", ["alone", "in a LLaVA"])
def test_each_list_hits_its_stage_and_nothing_else(inside):
    """Pins names that end alike: the patches' `proj`, LLaVA's own projector, a Llama's layers."""
    blocks = [f"sam_model.blocks.{index}" for index in range(2)]
    layers = [f"vision_model.transformer.layers.{index}" for index in range(2)]
    expected = {
        "sam": {f"{block}.{name}" for block in blocks for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")},
        "neck": {"sam_model.neck.0", "sam_model.neck.2"},
        "compressor": {"sam_model.net_2", "sam_model.net_3"},
        "clip": {
            f"{layer}.{name}"
            for layer in layers
            for name in ("self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
        },
        "projector": {"projector.layers"},
    }
    assert expected.keys() == LORA_TARGETS.keys()
    for stage, names in expected.items():
        if inside == "alone":
            model, place = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected")), ""
        else:
            model, place = llava(text_config(), "projected"), "model.vision_tower."
        assert targeted(adapted(model, LORA_TARGETS[stage])) == {f"{place}{name}" for name in names}, stage


def test_the_lists_together_are_all_linear_layers_and_convolutions_but_the_patches():
    """Pins a layer that is added later and forgotten here, and lists that can be joined."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    joined = LORA_TARGETS["sam"] + LORA_TARGETS["clip"]
    both = targeted(adapted(DeepSeekOCRVisionModel(tiny_config(feature_mode="projected")), joined))
    assert targeted(adapted(model, EVERYTHING)) == layers - {"sam_model.patch_embed.proj"}
    assert {name.split(".")[0] for name in both} == {"sam_model", "vision_model"}


@pytest.mark.parametrize(
    ("config", "clashes"),
    [
        (text_config(LlamaConfig), False),
        (text_config(MistralConfig), False),
        (text_config(Qwen3Config), False),
        (text_config(Phi3Config), True),
        (text_config(PhiConfig), True),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_language_model_with_layers_named_alike_can_be_left_out(config, clashes):
    """Pins what the docstring of `LORA_TARGETS` says of names that clash, and what to do then."""

    def language_layers(**options) -> set[str]:
        with torch.device("meta"):
            model = llava(config)
        return {name for name in targeted(adapted(model, EVERYTHING[:-1], **options)) if "language_model" in name}

    assert bool(language_layers()) == clashes
    assert not language_layers(exclude_modules=r".*language_model.*")


# Learning


def test_all_adapters_get_gradients_and_everything_else_is_frozen():
    """Pins adapters that a formulation of attention goes around."""
    model = adapted(DeepSeekOCRVisionModel(tiny_config(feature_mode="projected")), EVERYTHING)
    model(pixels()).last_hidden_state.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


def test_a_new_adapter_changes_nothing_before_its_first_step_and_then_learns_throughout():
    """Pins peft's start, B = 0: A gets its first gradient in the second step."""
    base = DeepSeekOCRVisionModel(tiny_config())
    expected = base(pixels()).last_hidden_state.detach()
    model = adapted(base, LORA_TARGETS["sam"] + LORA_TARGETS["clip"], init_lora_weights=True)
    assert torch.equal(model(pixels()).last_hidden_state, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(pixels()).last_hidden_state.square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert bool(parameter.grad.any()) == (step > 0 or "lora_B" in name), name
        optimizer.step()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_adapters_the_same_gradients(use_reentrant):
    """Pins reentrant checkpointing, which gives none unless its input requires one: `enable_input_require_grads`."""
    base = DeepSeekOCRVisionModel(tiny_config()).train()
    model = adapted(base, LORA_TARGETS["sam"] + LORA_TARGETS["clip"])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(pixels()).last_hidden_state.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual = gradients()
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6, rtol=1e-4) for name in expected)


def test_adapters_of_the_tables_of_positions_are_alive_and_merge():
    """Pins LoRA on an embedding that was read past its forward pass: accepted, and without any effect or gradient."""
    base = DeepSeekOCRVisionModel(tiny_config(feature_mode="concat")).double()
    plain = base(pixels(dtype=torch.float64)).last_hidden_state
    model = adapted(base, ["position_embedding"])
    tokens = model(pixels(dtype=torch.float64)).last_hidden_state
    tokens.sum().backward()
    assert relative_error(tokens, plain) > 1e-2
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2
    assert all(parameter.grad.any() for parameter in trained)
    merged = model.merge_and_unload()
    assert relative_error(merged(pixels(dtype=torch.float64)).last_hidden_state, tokens) < 1e-9


def test_layer_decay_gives_adapters_the_rates_of_their_layers():
    """Pins peft's wrappers, under which every name is another one."""
    model = adapted(DeepSeekOCRVisionModel(tiny_config()), LORA_TARGETS["clip"])
    groups = layer_decay_groups(model, learning_rate=1.0, layer_decay=0.5)
    assert {group["name"].removeprefix("base_model.model."): group["lr"] for group in groups} == {
        "clip.layers.0": 0.25,
        "clip.layers.1": 0.5,
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trainable)


# Merging, saving, writing back


@pytest.mark.parametrize("feature_mode", ["residual", "projected"])
def test_merging_is_exact(feature_mode):
    """Pins weights that are used in another way than by their layer: the merged model would give other tokens."""
    base = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).double().eval()
    plain = base(pixels(dtype=torch.float64)).last_hidden_state
    model = adapted(base, EVERYTHING if feature_mode == "projected" else EVERYTHING[:-1])
    expected = model(pixels(dtype=torch.float64)).last_hidden_state
    assert relative_error(expected, plain) > 1e-2
    merged = model.merge_and_unload()
    assert type(merged) is DeepSeekOCRVisionModel
    assert relative_error(merged(pixels(dtype=torch.float64)).last_hidden_state, expected) < 1e-9


def test_an_adapter_is_saved_by_itself_and_loads_onto_its_encoder(tmp_path):
    """Pins the adapter's folder, by peft's class and by its Auto class, which takes the encoder from its folder."""
    DeepSeekOCRVisionModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    base = AutoModel.from_pretrained(tmp_path / "encoder")
    model = adapted(base, LORA_TARGETS["sam"] + LORA_TARGETS["clip"]).eval()
    expected = model(pixels()).last_hidden_state
    model.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "adapter").iterdir()}
    again = AutoModel.from_pretrained(tmp_path / "encoder")
    # Newer versions of peft import only what they know or are told.
    parameters = inspect.signature(peft.AutoPeftModel.from_pretrained).parameters
    allowed = {"import_allowlist": ["deepseek_ocr_vision"]} if "import_allowlist" in parameters else {}
    for loaded in (
        peft.PeftModel.from_pretrained(again, tmp_path / "adapter"),
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", **allowed),
    ):
        assert torch.equal(loaded.eval()(pixels()).last_hidden_state, expected)


def test_a_merged_encoder_is_saved_as_any_other_and_goes_out_in_the_official_layout(tmp_path):
    """Pins the whole way: official weights in, LoRA, merged, saved, official weights out; unmerged it is refused."""
    config = tiny_config(feature_mode="projected")
    base = write_checkpoint(tmp_path / "base", released_tensors(DeepSeekOCRVisionModel(config)), config)
    encoder = DeepSeekOCRVisionModel.from_deepseek_ocr(base, feature_mode="projected")
    model = adapted(encoder, EVERYTHING)
    with pytest.raises(ValueError, match="merge_and_unload"):
        encoder.write_deepseek_ocr(base, tmp_path / "out")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged.write_deepseek_ocr(base, tmp_path / "out")
    assert_same_weights(AutoModel.from_pretrained(tmp_path / "merged"), merged)
    out = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "out", feature_mode="projected")
    assert_same_weights(out, merged)
    before = DeepSeekOCRVisionModel.from_deepseek_ocr(base, feature_mode="projected").state_dict()
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"{name}.weight" for name in targeted(adapted(out, EVERYTHING))}


# Trainer


def test_trainer_trains_adapters_in_a_classifier(tmp_path):
    """Pins an adapted encoder inside of a module that knows nothing of peft."""

    class PageClassifier(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(32, 2)

        def forward(self, pixel_values, labels):
            logits = self.head(self.encoder(pixel_values).pooler_output)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = PageClassifier(adapted(DeepSeekOCRVisionModel(tiny_config()), LORA_TARGETS["clip"]))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [{"pixel_values": pixels(1)[0], "labels": torch.tensor(label)} for label in (0, 1, 0, 1)]
    train(model, rows, tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != ("lora_" in name or "head" in name), name


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer_trains_adapters_and_a_projector_in_a_llava(tmp_path, gradient_checkpointing):
    """Pins `modules_to_save`: the projector is trained whole, saved with the adapter, and loads with it."""
    composite = llava(text_config())
    composite.save_pretrained(tmp_path / "composite")
    composite = LlavaForConditionalGeneration.from_pretrained(tmp_path / "composite")
    options = {"exclude_modules": r".*language_model.*", "modules_to_save": ["multi_modal_projector"]}
    model = adapted(composite, LORA_TARGETS["sam"] + LORA_TARGETS["clip"], **options)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [llava_row(answer) for answer in (3, 4, 3, 4)]
    train(model, rows, tmp_path / "run", gradient_checkpointing=gradient_checkpointing)
    for name, parameter in model.named_parameters():
        is_trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(parameter, start[name]) != is_trained, name
    batch = {name: values[None] for name, values in llava_row(3).items()}
    expected = model.eval()(**batch).logits
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "composite")
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "run" / "checkpoint-2").eval()
    assert torch.equal(loaded(**batch).logits, expected)
    assert torch.allclose(loaded.merge_and_unload()(**batch).logits, expected, atol=1e-5)


def test_the_page_about_lora_runs_from_top_to_bottom(capsys):
    """Pins `docs/lora.md`: its code, and the numbers of its table."""
    text = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)), {})
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    for stage in LORA_TARGETS:
        assert re.search(rf'^\| `"{stage}"` \|.*\| {int(printed[stage]):,} \|$', text, flags=re.MULTILINE), stage
