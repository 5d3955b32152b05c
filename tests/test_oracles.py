"""The encoder against two other implementations of it, around the same weights.

transformers' `UnlimitedOcrVisionModel` has the architecture of the released model, `deepseek-ocr-encoder` that of
`residual` mode. Both are independent of our code and of the golden numbers.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    GRADIENT_TOLERANCE,
    IMPLEMENTATIONS,
    TOLERANCE,
    golden_pixels,
    needs_golden,
    pixels,
    relative_error,
    tiny_config,
)
from torch import nn

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel


unlimited_ocr = pytest.importorskip(
    "transformers.models.unlimited_ocr.modeling_unlimited_ocr", reason="this transformers has no Unlimited-OCR"
)
from transformers import UnlimitedOcrVisionConfig, UnlimitedOcrVisionModel  # noqa: E402


FP32 = TOLERANCE[torch.float32]
RENAMES = (
    (r"^sam_model\.patch_embed\.proj\.", "sam_encoder.patch_embed.projection."),
    (r"^sam_model\.blocks\.(\d+)\.norm(\d)\.", r"sam_encoder.layers.\1.layer_norm\2."),
    (r"^sam_model\.blocks\.", "sam_encoder.layers."),
    (r"^sam_model\.neck\.0\.", "sam_encoder.neck.conv1."),
    (r"^sam_model\.neck\.1\.", "sam_encoder.neck.layer_norm1."),
    (r"^sam_model\.neck\.2\.", "sam_encoder.neck.conv2."),
    (r"^sam_model\.neck\.3\.", "sam_encoder.neck.layer_norm2."),
    (r"^sam_model\.net_2\.", "sam_encoder.proj.conv1."),
    (r"^sam_model\.net_3\.", "sam_encoder.proj.conv2."),
    (r"^sam_model\.", "sam_encoder."),
    (r"^vision_model\.transformer\.", "vision_encoder.encoder."),
    (r"^vision_model\.", "vision_encoder."),
)


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under our names as tensors under Unlimited-OCR's, the fused projection split in three."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMES:
            name, found = re.subn(pattern, replacement, name)
            if found:
                break
        if "qkv_proj" in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            result |= {name.replace("qkv_proj", f"{letter}_proj"): part for letter, part in parts}
        else:
            result[name] = tensor
    return result


def oracle_of(model: DeepSeekOCRVisionModel) -> UnlimitedOcrVisionModel:
    """Unlimited-OCR's encoder of the same shape around the same weights, with SDPA."""
    sam, clip = model.config.sam_config, model.config.clip_config
    sam_fields = {name: getattr(sam, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sam_fields |= {name: getattr(sam, name) for name in ("mlp_dim", "window_size", "global_attn_indexes")}
    sam_fields |= {name: getattr(sam, name) for name in ("output_channels", "downsample_channels", "image_size")}
    clip_fields = {name: getattr(clip, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    clip_fields |= {"num_attention_heads": clip.num_attention_heads, "image_size": clip.grid_size * 14}
    config = UnlimitedOcrVisionConfig(sam_config=sam_fields, encoder_config=clip_fields)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        oracle = UnlimitedOcrVisionModel(config)
    position_ids = torch.arange(clip.grid_size**2 + 1)[None]
    oracle.load_state_dict(renamed(dict(model.state_dict())), assign=True)
    oracle.vision_encoder.embeddings.position_ids = position_ids
    return oracle.requires_grad_()


def assert_same_outputs_and_gradients(model: DeepSeekOCRVisionModel, pixel_values: torch.Tensor) -> None:
    oracle = oracle_of(model)
    outputs, gradients = [], []
    for module in (model, oracle):
        module_pixels = pixel_values.clone().requires_grad_()
        tokens = module(module_pixels).last_hidden_state
        weighting = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
        (tokens * weighting).mean().backward()
        outputs.append(tokens.detach())
        gradients.append({name: p.grad for name, p in module.named_parameters()} | {"pixels": module_pixels.grad})
        # The two share their weights, so their gradients would add up.
        module.zero_grad(set_to_none=True)
    ours, theirs = renamed(gradients[0]), gradients[1]
    assert relative_error(outputs[0], outputs[1]) < FP32
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # The bias of the keys moves no output, so its gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            difference = (ours[name] - expected).norm() / expected.norm()
            assert difference < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize(("height", "width"), [(128, 128), (192, 128), (320, 320)])
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_a_tiny_model_agrees_with_unlimited_ocr_in_outputs_and_all_gradients(height, width, attn_implementation):
    """Pins other sizes than the released one: resized tables, windows with padding, other widths and depths."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="concat", attn_implementation=attn_implementation))
    assert_same_outputs_and_gradients(model, pixels(2, height, width))


@needs_golden
def test_the_full_size_model_agrees_with_unlimited_ocr_in_outputs_and_all_gradients(golden_model):
    """Pins the gradients of all 470 tensors, of which the golden file holds only some."""
    assert_same_outputs_and_gradients(golden_model("concat"), golden_pixels(512))


class TensorOutput(nn.Module):
    """A module whose output object is reduced to its tensor, as DeepSeek's own modules give it."""

    def __init__(self, module: nn.Module, argument: str):
        super().__init__()
        self.module = module
        self.argument = argument

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.module(**{self.argument: hidden_states}).last_hidden_state


@pytest.mark.parametrize("side", [128, 256, 1024])
def test_residual_tokens_are_those_of_the_package_deepseek_ocr_encoder(side):
    """Pins the feature mode that people have trained projectors on, with that package's own decorated forward."""
    package = pytest.importorskip("deepseek_ocr_encoder", reason="the extra `encoder` is not installed")
    sam_fields = tiny_config().sam_config.to_dict() | {"downsample_channels": [24, 1024]}
    clip_fields = tiny_config().clip_config.to_dict() | {"hidden_size": 1024, "grid_size": 4}
    config = DeepSeekOCRVisionConfig(sam_config=sam_fields, clip_config=clip_fields)
    # In double precision: weights as large as these amplify what single precision rounds.
    model = DeepSeekOCRVisionModel(config).double()
    concat = DeepSeekOCRVisionModel(
        DeepSeekOCRVisionConfig(**(config.to_dict() | {"feature_mode": "concat", "hidden_size": 2048}))
    )
    concat.double().load_state_dict(model.state_dict(), strict=False)
    oracle = oracle_of(concat)

    vision_model = SimpleNamespace(
        pre_layrnorm=oracle.vision_encoder.pre_layrnorm,
        transformer=TensorOutput(oracle.vision_encoder.encoder, "inputs_embeds"),
        embeddings=oracle.vision_encoder.embeddings,
    )
    full_model = SimpleNamespace(sam_model=TensorOutput(oracle.sam_encoder, "pixel_values"), vision_model=vision_model)
    encoder = package.DeepSeekOCREncoder(
        full_model, device="cpu", dtype=torch.float64, freeze=False, precompute_pos_for_1024=side == 1024
    )
    expected = encoder._forward_core(pixels(1, side, side, dtype=torch.float64))
    actual = model(pixels(1, side, side, dtype=torch.float64)).last_hidden_state
    assert relative_error(actual.detach(), expected.clone()) < 1e-5
    assert actual.requires_grad
    assert not expected.requires_grad
