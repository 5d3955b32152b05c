"""A trainable model of a live encoder of the package `deepseek-ocr-encoder`: the same tokens, and now gradients."""

from types import SimpleNamespace

import pytest
import torch
from helpers import TOLERANCE, assert_same_weights, pixels, relative_error, tiny_config
from torch import nn

from deepseek_ocr_vision import DeepSeekOCRVisionModel


package = pytest.importorskip("deepseek_ocr_encoder", reason="the extra `encoder` is not installed")


class PlainTransformer(nn.Module):
    """A CLIP transformer that takes and gives a tensor, as DeepSeek's does; its names begin with `layers`."""

    def __init__(self, layers: nn.ModuleList, *, split: bool):
        super().__init__()
        self.layers = layers
        if split:
            for layer in layers:
                split_projection(layer.self_attn)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)[0]
        return hidden_states


class SplitProjection(nn.Module):
    """Query, key and value as three layers side by side."""

    def __init__(self, fused: nn.Linear):
        super().__init__()
        weights, biases = fused.weight.detach().chunk(3), fused.bias.detach().chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            setattr(self, name, layer)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(hidden_states), self.k(hidden_states), self.v(hidden_states)], dim=-1)


def split_projection(attention: nn.Module) -> None:
    """Give an attention module the parameter names of transformers' Unlimited-OCR."""
    split = SplitProjection(attention.qkv_proj)
    attention.q_proj, attention.k_proj, attention.v_proj = split.q, split.k, split.v
    del attention.qkv_proj
    object.__setattr__(attention, "qkv_proj", split)


def make_encoder(*, split: bool = False, **options) -> package.DeepSeekOCREncoder:
    """That package's own class around tiny stages; it asks for 1024 channels between them."""
    sam = tiny_config().sam_config.to_dict() | {"downsample_channels": [24, 1024]}
    clip = tiny_config().clip_config.to_dict() | {"hidden_size": 1024, "num_attention_heads": 8, "grid_size": 4}
    stages = DeepSeekOCRVisionModel(tiny_config(sam_config=sam, clip_config=clip))
    vision_model = SimpleNamespace(
        pre_layrnorm=stages.vision_model.pre_layrnorm,
        transformer=PlainTransformer(stages.vision_model.transformer.layers, split=split),
        embeddings=stages.vision_model.embeddings,
    )
    full_model = SimpleNamespace(sam_model=stages.sam_model, vision_model=vision_model)
    return package.DeepSeekOCREncoder(
        full_model, device="cpu", dtype=torch.float32, precompute_pos_for_1024=False, **options
    )


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_the_tokens_are_the_encoders_and_every_parameter_gets_a_gradient(split, copy):
    """Pins the way out of `torch.inference_mode()`, for an encoder that its package has frozen."""
    encoder = make_encoder(split=split)
    expected = encoder._forward_core(pixels(1, 192, 192)).clone()
    model = DeepSeekOCRVisionModel.from_encoder(encoder, copy=copy)
    tokens = model(pixels(1, 192, 192)).last_hidden_state
    assert relative_error(tokens.detach(), expected) < TOLERANCE[torch.float32]
    nn.Linear(1024, 4)(tokens).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert model.config.feature_mode == "residual"
    assert model.config.clip_config.num_attention_heads == 8


@pytest.mark.parametrize("split", [False, True])
def test_by_default_training_the_model_trains_the_encoder(split):
    """Pins sharing: one set of weights in memory, also where query, key and value are apart."""
    encoder = make_encoder(split=split)
    model = DeepSeekOCRVisionModel.from_encoder(encoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = encoder._forward_core(pixels(1)).clone()
    model(pixels(1)).last_hidden_state.square().mean().backward()
    optimizer.step()
    encoder._pos_cache.clear()
    after = encoder._forward_core(pixels(1)).clone()
    assert not torch.equal(before, after)
    assert relative_error(model(pixels(1)).last_hidden_state.detach(), after) < TOLERANCE[torch.float32]
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert all(parameter.untyped_storage().data_ptr() in held for parameter in encoder.parameters())


@pytest.mark.parametrize("split", [False, True])
def test_a_copy_leaves_the_encoder_alone(split):
    """Pins `copy=True`."""
    encoder = make_encoder(split=split)
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    model = DeepSeekOCRVisionModel.from_encoder(encoder, copy=True)
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in encoder.named_parameters())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_weights_made_under_inference_mode_can_only_be_copied():
    """Pins the error that people come here with: such tensors cannot be saved for backward."""
    with torch.inference_mode():
        encoder = make_encoder()
    with pytest.raises(ValueError, match=r"inference_mode.*copy=True"):
        DeepSeekOCRVisionModel.from_encoder(encoder)
    model = DeepSeekOCRVisionModel.from_encoder(encoder, copy=True)
    model(pixels(1)).last_hidden_state.mean().backward()


def test_a_model_of_an_encoder_saves_and_loads(tmp_path):
    """Pins the way on: sizes that were told by the tensors alone are written down."""
    model = DeepSeekOCRVisionModel.from_encoder(make_encoder(split=True))
    model.save_pretrained(tmp_path)
    assert_same_weights(DeepSeekOCRVisionModel.from_pretrained(tmp_path), model)


def test_something_else_is_refused_with_what_it_lacks():
    """Pins a tokenizer, a plain module, or the class in place of an encoder."""
    for other in (nn.Linear(1, 1), None, "deepseek-ai/DeepSeek-OCR"):
        with pytest.raises(TypeError, match="without sam, clip_pre, clip_tr, clip_pos_table"):
            DeepSeekOCRVisionModel.from_encoder(other)
    encoder = make_encoder()
    encoder.clip_tr.layers[1].mlp.fc1 = nn.Linear(1024, 7)
    with pytest.raises(ValueError, match="another shape"):
        DeepSeekOCRVisionModel.from_encoder(encoder)
    encoder = make_encoder()
    encoder.sam.pos_embed.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"sam_model\.pos_embed holds NaN"):
        DeepSeekOCRVisionModel.from_encoder(encoder)
