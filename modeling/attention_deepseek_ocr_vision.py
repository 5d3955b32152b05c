"""Attention of both stages: one class each, and the functions that compute it, looked up by name at every call.

Letters in the shapes: B batch, H and W rows and columns of the grid, N = H x W tokens, A heads, D width of a head,
C = A x D channels.

SAM adds a decomposed relative position to the logits (MViTv2, arXiv 2112.01526, section 4.1, as segment-anything
computes it): for a query at row h, column w and a key at row i, column j,

    logit = scaling * q . k + q . R_h[h - i] + q . R_w[w - j]

where R_h and R_w are learned tables of 2n - 1 rows each, and the query in the last two terms is *not* scaled.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionClipConfig, DeepSeekOCRVisionSamConfig


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for steps that lose too much in half precision: float32, or float64 if that is what comes in."""
    return torch.promote_types(dtype, torch.float32)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, A, N, D]
    key: torch.Tensor,  # [B, A, N, D]
    value: torch.Tensor,  # [B, A, N, D]
    attention_mask: torch.Tensor | None,  # [B, A, N, N], added to the logits
    *,
    scaling: float,
    **_,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain steps, which also gives its weights: ([B, N, A, D], [B, A, N, N])."""
    logits = (query * scaling) @ key.transpose(-2, -1)  # [B, A, N, N]
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = F.softmax(logits, dim=-1, dtype=at_least_float32(query.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, A, N, D]
    key: torch.Tensor,  # [B, A, N, D]
    value: torch.Tensor,  # [B, A, N, D]
    attention_mask: torch.Tensor | None,  # [B, A, N, N], added to the logits
    *,
    scaling: float,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention by `torch.nn.functional.scaled_dot_product_attention`, without its weights: ([B, N, A, D], None)."""
    if query.shape[0] == 0:
        # PyTorch's gives the mask no gradient then, not even an empty one, and DDP would wait for it.
        return eager_attention(module, query, key, value, attention_mask, scaling=scaling)[0], None
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.transpose(1, 2), None


_ATTENTION_FUNCTIONS: dict[str, Callable] = {"eager": eager_attention, "sdpa": sdpa_attention}


def attention_function(attn_implementation: str) -> Callable:
    """The function behind an `attn_implementation`: ours, or one registered with transformers' `AttentionInterface`.

    Raises:
        ValueError: No function goes by that name.
    """
    if attn_implementation in _ATTENTION_FUNCTIONS:
        return _ATTENTION_FUNCTIONS[attn_implementation]
    if attn_implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[attn_implementation]
    allowed = ", ".join(_ATTENTION_FUNCTIONS)
    raise ValueError(
        f"`attn_implementation` is {attn_implementation!r}; it has to be one of {allowed}, or a name registered with "
        "`transformers.AttentionInterface`."
    )


def split_heads(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, each [B, A, N, D], as views of a fused projection [B, ..., 3C] (rows ordered q, k, v)."""
    batch_size, width = qkv.shape[0], qkv.shape[-1]
    num_tokens = qkv.shape[1:-1].numel()
    qkv = qkv.view(batch_size, num_tokens, 3, num_heads, width // (3 * num_heads))  # [B, N, 3, A, D]
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def relative_positions(table: torch.Tensor, size: int) -> torch.Tensor:
    """Pick the row for every pair of a query and a key along one axis.

    Args:
        table: [2n - 1, D], for offsets -(n - 1) to n - 1; resized linearly in float32 if n is not `size`.
        size: Positions along the axis.

    Returns:
        [size, size, D], entry (query, key) for the offset query - key.
    """
    if table.shape[0] != 2 * size - 1:
        resized = table.t()[None].to(at_least_float32(table.dtype))  # [1, D, 2n - 1]
        table = F.interpolate(resized, size=2 * size - 1, mode="linear")[0].t().to(table.dtype)
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions[None, :] + size - 1]


def relative_position_bias(
    query: torch.Tensor, rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """The decomposed relative positions as one tensor to add to the logits.

    Args:
        query: [B, A, N, D], not scaled.
        rel_pos_h: [2n - 1, D], the table of the rows.
        rel_pos_w: [2n - 1, D], the table of the columns.
        grid: (H, W), with H x W = N.

    Returns:
        [B, A, N, N].
    """
    batch_size, num_heads, num_tokens, head_dim = query.shape
    height, width = grid
    query = query.view(batch_size, num_heads, height, width, head_dim)
    rel_h = torch.einsum("bahwd,hid->bahwi", query, relative_positions(rel_pos_h, height))  # [B, A, H, W, H]
    rel_w = torch.einsum("bahwd,wjd->bahwj", query, relative_positions(rel_pos_w, width))  # [B, A, H, W, W]
    # Both are small; contiguous, they make their large sum contiguous as well, so that the view below copies nothing.
    bias = rel_h.contiguous()[..., :, None] + rel_w.contiguous()[..., None, :]  # [B, A, H, W, H, W]
    return bias.view(batch_size, num_heads, num_tokens, num_tokens)


class SamAttention(nn.Module):
    """Attention over a grid, with decomposed relative positions; the grid is a window or the whole page.

    Args:
        config: The SAM stage.
        table_size: Side of the grid that the relative-position tables are laid out for.
    """

    def __init__(self, config: DeepSeekOCRVisionSamConfig, *, table_size: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_size - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_size - 1, head_dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [B, H, W, C] -> [B, H, W, C]
        _, height, width, _ = hidden_states.shape
        query, key, value = split_heads(self.qkv(hidden_states), self.num_heads)  # each [B, A, N, D]
        bias = relative_position_bias(query, self.rel_pos_h, self.rel_pos_w, (height, width))  # [B, A, N, N]
        attend = attention_function(self.config._attn_implementation)
        output, _ = attend(self, query, key, value, bias, scaling=self.scaling, is_causal=False)  # [B, N, A, D]
        return self.proj(output.reshape(hidden_states.shape))


class ClipAttention(nn.Module):
    """Plain multi-head self-attention with a fused projection."""

    def __init__(self, config: DeepSeekOCRVisionClipConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(  # [B, N, C] -> [B, N, C], [B, A, N, N]
        self, hidden_states: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = split_heads(self.qkv_proj(hidden_states), self.num_heads)  # each [B, A, N, D]
        # Only the eager function makes the weights, so it serves whoever asks for them.
        attend = attention_function("eager" if output_attentions else self.config._attn_implementation)
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, is_causal=False)  # [B, N, A, D]
        return self.out_proj(output.reshape(hidden_states.shape)), weights
