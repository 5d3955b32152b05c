"""The first stage: SAM's ViT-B image encoder (arXiv 2304.02643), its neck, and DeepSeek-OCR's 16x compressor.

Letters in the shapes: B batch, H and W rows and columns of the patch grid, C channels.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionSamConfig
from .attention_deepseek_ocr_vision import SamAttention
from .base_deepseek_ocr_vision import (
    DeepSeekOCRVisionPreTrainedModel,
    FeedForward,
    checkpointable,
    is_emulated,
    is_recording,
    keep_rng_state,
    never_emulated,
    resize_positions,
)


logger = logging.get_logger(__name__)


class SamPatchEmbed(nn.Module):
    """Pixels to patches: a convolution whose stride is its kernel."""

    def __init__(self, config: DeepSeekOCRVisionSamConfig, *, num_channels: int):
        super().__init__()
        side = config.patch_size
        self.proj = nn.Conv2d(num_channels, config.hidden_size, kernel_size=side, stride=side)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # [B, 3, height, width] -> [B, H, W, C]
        # Contiguous, or every norm and every sum of the blocks would go through the channels in strides of H x W.
        return self.proj(pixel_values).permute(0, 2, 3, 1).contiguous()


class SamBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block that attends in windows or, if its index says so, to the whole grid."""

    def __init__(self, config: DeepSeekOCRVisionSamConfig, *, index: int):
        super().__init__()
        is_global = index in config.global_attn_indexes
        table_size = config.image_size // config.patch_size if is_global else config.window_size
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = SamAttention(config, table_size=table_size, window_size=0 if is_global else config.window_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        names = ("lin1", "lin2")
        self.mlp = FeedForward(config.hidden_size, config.mlp_dim, activation=config.hidden_act, names=names)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [B, H, W, C] -> [B, H, W, C]
        with never_emulated(hidden_states):
            hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
            return hidden_states + self.mlp(self.norm2(hidden_states))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of an image in channels-first order."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SamEncoder(DeepSeekOCRVisionPreTrainedModel):
    """The SAM stage: pixels [B, 3, height, width] to the compressed grid [B, 1024, height / 64, width / 64]."""

    config_class = DeepSeekOCRVisionSamConfig
    base_model_prefix = "sam_model"
    embeddings_path = "patch_embed.proj"

    def __init__(self, config: DeepSeekOCRVisionSamConfig, *, num_channels: int = 3):
        super().__init__(config)
        table_size = config.image_size // config.patch_size
        width, (middle_width, out_width) = config.output_channels, config.downsample_channels
        with keep_rng_state():
            self.patch_embed = SamPatchEmbed(config, num_channels=num_channels)
            self.pos_embed = nn.Parameter(torch.zeros(1, table_size, table_size, config.hidden_size))
            self.blocks = nn.ModuleList(SamBlock(config, index=index) for index in range(config.num_hidden_layers))
            self.neck = nn.Sequential(
                nn.Conv2d(config.hidden_size, width, kernel_size=1, bias=False),
                LayerNorm2d(width, eps=config.layer_norm_eps),
                nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(width, eps=config.layer_norm_eps),
            )
            self.net_2 = nn.Conv2d(width, middle_width, kernel_size=3, stride=2, padding=1, bias=False)
            self.net_3 = nn.Conv2d(middle_width, out_width, kernel_size=3, stride=2, padding=1, bias=False)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        table, device = self.pos_embed, pixel_values.device  # not `self.dtype`: a replica has no parameters
        if pixel_values.is_meta != table.is_meta:
            places = f"on {device} and the model on {table.device}"
            raise ValueError(f"`pixel_values` is {places}; tensors on the meta device have a shape and no values.")
        if not is_recording() and is_emulated(table.dtype, device):
            logger.warning_once(f"The CPU has no {table.dtype} products; `model.float()` saves converting to float32.")
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            # Counting to them fixes sizes: torch 2.14's Inductor has no backward pass for tables resized to open ones.
            [*range(pixel_values.shape[-2]), *range(pixel_values.shape[-1])]
        pixel_values = pixel_values.to(table.dtype)
        with never_emulated(pixel_values):
            hidden_states = self.patch_embed(pixel_values)  # [B, H, W, C]
            grid = (hidden_states.shape[1], hidden_states.shape[2])
            hidden_states = hidden_states + resize_positions(table[0], grid, antialias=True)
            for block in self.blocks:
                hidden_states = block(checkpointable(block, hidden_states))
            hidden_states = self.neck(hidden_states.permute(0, 3, 1, 2))  # [B, 256, H, W]
            return self.net_3(self.net_2(hidden_states))  # [B, 1024, H / 4, W / 4]
