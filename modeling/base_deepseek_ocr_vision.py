"""What the whole encoder and its two stages share: how transformers treats them, and how new weights are drawn."""

from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_deepseek_ocr_vision import at_least_float32


class DeepSeekOCRVisionPreTrainedModel(PreTrainedModel):
    """Base of the encoder and of its stages."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["SamBlock", "ClipLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # SAM adds a bias to its logits, which neither of the two takes.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw every weight from a normal distribution, set biases to 0 and layer norms to the identity."""
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.initializer_range)

    @property
    def initializer_range(self) -> float:
        """Standard deviation of newly drawn weights."""
        return self.config.initializer_range


def without_drawing() -> AbstractContextManager:
    """Leave the random state alone while modules are built, so that `_init_weights` alone decides what a seed gives.

    PyTorch's modules draw weights of their own when they are built, but not on the meta device, where transformers
    builds a model that it loads: one seed would give two models.
    """
    return torch.random.fork_rng(devices=[])


def resize_positions(
    positions: torch.Tensor,  # [H, W, C]
    grid: tuple[int, int],
    *,
    antialias: bool,
) -> torch.Tensor:
    """Resize a position table [H, W, C] to another grid, bicubic, in float32; the table itself if it fits already."""
    if positions.shape[:2] == grid:
        return positions
    channels_first = positions.permute(2, 0, 1)[None].to(at_least_float32(positions.dtype))  # [1, C, H, W]
    resized = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized[0].permute(1, 2, 0).to(positions.dtype)


def checkpointable(layer: GradientCheckpointingLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """Make sure that reentrant gradient checkpointing sees an input that requires a gradient.

    It gives a layer's weights no gradient otherwise, which happens to the first trainable layer above frozen ones.
    """
    needs_gradient = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    if needs_gradient and not hidden_states.requires_grad and any(p.requires_grad for p in layer.parameters()):
        hidden_states.requires_grad_()
    return hidden_states
