"""The second stage: CLIP-L's vision transformer (arXiv 2103.00020), fed with the compressed grid of the first.

Letters in the shapes: B batch, H and W rows and columns of the token grid, N tokens of an image, A heads, C
channels.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionClipConfig
from .attention_deepseek_ocr_vision import ClipAttention
from .base_deepseek_ocr_vision import (
    DeepSeekOCRVisionPreTrainedModel,
    FeedForward,
    checkpointable,
    keep_rng_state,
    never_emulated,
    resize_positions,
)


class ClipEmbeddings(nn.Module):
    """Position table and, where the feature mode has one, class token. CLIP's patch embedding is not used.

    The table keeps row 0, the class token's, also where there is none, so that its shape is the released one.
    """

    def __init__(self, config: DeepSeekOCRVisionClipConfig, *, class_token: bool):
        super().__init__()
        self.grid_size = config.grid_size
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if class_token else None
        self.position_embedding = nn.Embedding(config.grid_size**2 + 1, config.hidden_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:  # [B, C, H, W] -> [B, N (+ 1), C]
        batch_size, channels, height, width = feature_map.shape
        # By its forward pass, as adapters, offloading and sharding need it.
        rows = torch.arange(self.grid_size**2 + 1, device=feature_map.device)
        table = self.position_embedding(rows)  # [1 + grid x grid, C]
        positions = table[1:].view(self.grid_size, self.grid_size, channels)
        # The released model resizes with antialiasing, `deepseek-ocr-encoder`, which has no class token, without.
        positions = resize_positions(positions, (height, width), antialias=self.class_embedding is not None)
        # The stages may be of different dtypes.
        tokens = feature_map.to(table.dtype).flatten(2).transpose(1, 2) + positions.flatten(0, 1)  # [B, N, C]
        if self.class_embedding is None:
            return tokens
        class_token = (self.class_embedding + table[0]).expand(batch_size, 1, channels)
        return torch.cat([class_token, tokens], dim=1)


class ClipLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer; returns its attention's weights as well, if they were made."""

    def __init__(self, config: DeepSeekOCRVisionClipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ClipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        width, names = config.intermediate_size, ("fc1", "fc2")
        self.mlp = FeedForward(config.hidden_size, width, activation=config.hidden_act, names=names)

    def forward(  # [B, N, C] -> [B, N, C], [B, A, N, N]
        self, hidden_states: torch.Tensor, *, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with never_emulated(hidden_states):
            attended, weights = self.self_attn(self.layer_norm1(hidden_states), output_attentions=output_attentions)
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.layer_norm2(hidden_states)), weights


class ClipTransformer(nn.Module):
    """The stack of layers; there is no norm after the last."""

    def __init__(self, config: DeepSeekOCRVisionClipConfig):
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_hidden_layers))


class ClipEncoder(DeepSeekOCRVisionPreTrainedModel):
    """The CLIP stage: the compressed grid [B, C, H, W] to tokens [B, N, C], or [B, N + 1, C] with a class token."""

    config_class = DeepSeekOCRVisionClipConfig
    base_model_prefix = "vision_model"
    embeddings_path = "embeddings"
    main_input_name = "feature_map"

    def __init__(self, config: DeepSeekOCRVisionClipConfig, *, class_token: bool = True):
        super().__init__(config)
        with keep_rng_state():
            self.embeddings = ClipEmbeddings(config, class_token=class_token)
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.transformer = ClipTransformer(config)
        self.post_init()

    def forward(
        self,
        feature_map: torch.Tensor,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        hidden_states = self.pre_layrnorm(self.embeddings(feature_map))
        all_hidden_states, all_weights = [hidden_states], []
        for layer in self.transformer.layers:
            hidden_states = checkpointable(layer, hidden_states)
            hidden_states, weights = layer(hidden_states, output_attentions=output_attentions)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if output_attentions:
                all_weights.append(weights)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )
