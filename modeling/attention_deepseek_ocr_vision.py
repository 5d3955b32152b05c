"""Attention of both stages: one class each, and the functions that compute it, looked up by name at every call.

Letters in the shapes: B batch, H and W rows and columns of the grid, S and T rows and columns of a window, N tokens,
A heads, D width of a head, C = A x D channels.

SAM attends within windows of a grid, or to all of it, and adds a decomposed relative position to the logits (MViTv2,
arXiv 2112.01526, section 4.1, as segment-anything computes it). For a query at row h, column w and a key at row i,
column j of the same window,

    logit = scaling * q . k + q . R_h[h - i] + q . R_w[w - j]

where R_h and R_w are learned tables of 2n - 1 rows each, and the query in the last two terms is *not* scaled. For the
whole page that bias has 12 x 4096 x 4096 entries, 0.8 GB in float32. It can be computed in three ways, which differ
by rounding only:

- `"blockwise"`: for some queries of some heads at a time, so that logits stay in the processor's cache. The backward
  pass computes them again, as in FlashAttention (arXiv 2205.14135), and keeps only the fused projection and the output
  for it. Where the processor has no products in half precision, the blocks are computed in float32.
- `"sdpa_folded"`: with rel_h = q . R_h and rel_w = q . R_w, and with one-hot vectors for a key's row and column, the
  logit is a plain dot product, [scaling * q, rel_h, rel_w] . [k, onehot(i), onehot(j)], which flash kernels take.
- `"sdpa_masked"`: the bias as a tensor, handed to SDPA as its mask.

`"sdpa"` is the second of them on a GPU; on a CPU the first, which is one operator where a graph is compiled, and the
third where it is exported or traced. `"eager"` and functions registered with transformers' `AttentionInterface` get
the bias as a tensor too. The CLIP stage has no bias; there all three names mean SDPA.

In half precision, query, key, value, rel_h, rel_w, the weights and the output are rounded, as in the original code;
logits, the softmax, and sums over keys, blocks and windows are in float32. Where a CPU multiplies in half precision,
its products round the logits, so about the largest of each query is taken off first.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionClipConfig, DeepSeekOCRVisionSamConfig
from .base_deepseek_ocr_vision import at_least_float32, is_emulated, is_open, is_recording


BLOCK_BYTES = 8 << 20
"""Size of a block of logits. Of 1 to 64 MiB, 4 to 16 are fastest for a global block at 1024 on two cores."""

COPY_BYTES = 6 << 20
"""How much of queries, keys and values the backward pass copies at once: in float32 at 1024, two heads of a page. All
twelve raise the peak with gradient checkpointing by 0.13 GB. The forward pass copies all, which is 1.1 x as fast."""

_EAGER_ONLY = (
    "PyTorch's fused attention can be differentiated once, and not in forward mode. For second derivatives and "
    "`torch.func.jvp` use `model.set_attn_implementation('eager')`."
)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, A, N, D]
    key: torch.Tensor,  # [B, A, N, D]
    value: torch.Tensor,  # [B, A, N, D]
    attention_mask: torch.Tensor | None,  # [B, A, N, N], added to the logits
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain steps, which also gives its weights: ([B, N, A, D], [B, A, N, N])."""
    dtype = at_least_float32(query.dtype)
    logits = (query.to(dtype) * scaling) @ key.to(dtype).transpose(-2, -1)  # [B, A, N, N]
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = F.softmax(logits, dim=-1, dtype=dtype).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class _DifferentiableOnce(torch.autograd.Function):
    """The identity. It refuses what PyTorch cannot do with its fused kernels, and says what to use instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: torch.Tensor, is_gradient: bool) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, bool], output: torch.Tensor) -> None:
        ctx.is_gradient = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.is_gradient:
            raise NotImplementedError(_EAGER_ONLY)
        return _DifferentiableOnce.apply(gradient, True), None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(_EAGER_ONLY)


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,  # [B, A, N, D]
    key: torch.Tensor,  # [B, A, N, D]
    value: torch.Tensor,  # [B, A, N, D]
    attention_mask: torch.Tensor | None,  # [B, A, N, N], added to the logits
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by `torch.nn.functional.scaled_dot_product_attention`, without its weights: ([B, N, A, D], None)."""
    if query.shape[0] == 0:
        # PyTorch's gives the mask no gradient then, not even an empty one, and DDP would wait for it.
        return eager_attention(module, query, key, value, attention_mask, scaling=scaling)[0], None
    is_plain = attention_mask is None and torch.is_grad_enabled() and not is_recording()
    if is_plain and torch.backends.cuda.flash_sdp_enabled():  # in this order: a graph cannot ask the second
        query, key, value = (_DifferentiableOnce.apply(part, False) for part in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling).transpose(1, 2)
    # In a graph for ONNX its memory gets another order than it had when the graph was recorded.
    return output.clone(memory_format=torch.contiguous_format) if is_recording() else output, None


# How SAM's bias gets into the logits; without one they are all SDPA.
FORMULATIONS = ("blockwise", "sdpa_folded", "sdpa_masked")
_ATTENTION_FUNCTIONS: dict[str, Callable] = {"eager": eager_attention} | dict.fromkeys(
    ("sdpa", *FORMULATIONS), sdpa_attention
)

for _name in FORMULATIONS:
    # transformers takes only names that it knows for an `attn_implementation`.
    AttentionInterface.register(_name, sdpa_attention)


def attention_function(attn_implementation: str) -> Callable:
    """The function behind an `attn_implementation`: ours, or one registered with transformers' `AttentionInterface`.

    Raises:
        ValueError: No function goes by that name.
    """
    for functions in (_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS):
        if attn_implementation in functions:
            return functions[attn_implementation]
    allowed = ", ".join(_ATTENTION_FUNCTIONS)
    raise ValueError(
        f"`attn_implementation` is {attn_implementation!r}; it has to be one of {allowed}, or a name registered with "
        "`transformers.AttentionInterface`."
    )


def split_heads(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, each [B, A, N, D], as views of a fused projection [B, ..., 3C] (rows ordered q, k, v)."""
    qkv = qkv.flatten(1, -2).unflatten(-1, (3, num_heads, -1))  # [B, N, 3, A, D]
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def relative_positions(table: torch.Tensor, size: int, *, resize: bool = False) -> torch.Tensor:
    """Pick the row for every pair of a query and a key along one axis.

    Args:
        table: [2n - 1, D], for offsets -(n - 1) to n - 1; resized linearly in float32 if n is not `size`.
        size: Positions along the axis.
        resize: Whether to resize it also if n is `size`, which changes nothing, for graphs that leave `size` open.

    Returns:
        [size, size, D], entry (query, key) for the offset query - key, in float32 at least.
    """
    table = table.to(at_least_float32(table.dtype))  # in which the gradients of a row are added up
    if resize or table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.t()[None], size=2 * size - 1, mode="linear")[0].t()
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions[None, :] + size - 1]


def relative_position_terms(
    query: torch.Tensor,  # [..., s, t, D], not scaled; fewer rows or columns than a window has are its first ones
    table_h: torch.Tensor,  # [S, S, D], as `relative_positions` gives it for the rows
    table_w: torch.Tensor,  # [T, T, D], for the columns
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows and columns of the keys add to the logits: rel_h, [..., s, t, S], and rel_w, [..., s, t, T]."""
    rows, columns = query.shape[-3:-1]
    rel_h = torch.einsum("...std,sid->...sti", query, table_h[:rows])
    rel_w = torch.einsum("...std,tjd->...stj", query, table_w[:columns])
    return rel_h, rel_w


def fold_bias(
    query: torch.Tensor,  # [..., s, t, D], scaled
    key: torch.Tensor,  # [..., N, D], of S x T tokens
    rel_h: torch.Tensor,  # [..., s, t, S], of the query before it was scaled
    rel_w: torch.Tensor,  # [..., s, t, T]
    filling: int = 0,  # F, zeros at the end
) -> tuple[torch.Tensor, torch.Tensor]:  # [..., s, t, D + S + T + F], [..., N, D + S + T + F]
    """Fold relative positions into the width of a head, so that a logit is a plain dot product."""
    height, width = rel_h.shape[-1], rel_w.shape[-1]
    rows = torch.eye(height, dtype=key.dtype, device=key.device)[:, None].expand(height, width, height)
    columns = torch.eye(width, width + filling, dtype=key.dtype, device=key.device).expand(height, -1, -1)
    place = torch.cat([rows, columns], dim=-1).flatten(0, 1).expand(*key.shape[:-1], height + width + filling)
    rel_w = F.pad(rel_w, (0, filling)) if is_open(filling) or filling else rel_w
    return torch.cat([query, rel_h, rel_w], dim=-1), torch.cat([key, place], dim=-1)


def kernel_filling(width: int, dtype: torch.dtype, capability: tuple[int, int], *, is_trained: bool) -> int:
    """How much wider queries and keys are made for fused kernels on CUDA, by PyTorch's `sdp_utils.cpp`.

    In half precision to a multiple of 8, or they copy. On consumer cards (8.6 to 8.9, 12) flash attention has no
    backward pass for 193 to 224 (`check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89`).
    """
    if dtype.itemsize > 2:
        return 0
    is_consumer_card = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return 232 - width if is_consumer_card and is_trained and 192 < width <= 224 else -width % 8


# All windows at once, in steps that autograd, compilers and `torch.func` know.


def window_partition(
    grid: torch.Tensor,  # [B, H, W, C]
    window: tuple[int, int],  # (S, T)
    padding: torch.Tensor | None,  # [C], not needed where windows divide the grid
) -> torch.Tensor:  # [B x windows, S, T, C]
    """Cut a grid into windows, row by row, and fill them up at the bottom and the right."""
    batch_size, height, width, channels = grid.shape
    rows, columns = (_num_windows(length, side) for length, side in zip((height, width), window, strict=True))
    if padding is not None:
        whole = (rows * window[0], columns * window[1])
        # A graph for every size has as much padding for all, and cuts off what is too much.
        below, beside = window if is_open(height, width) else (whole[0] - height, whole[1] - width)
        grid = torch.cat([grid, padding.expand(batch_size, below, width, channels)], dim=1)[:, : whole[0]]
        grid = torch.cat([grid, padding.expand(batch_size, whole[0], beside, channels)], dim=2)[:, :, : whole[1]]
    windows = grid.view(batch_size, rows, window[0], columns, window[1], channels).transpose(2, 3)
    return windows.reshape(batch_size * rows * columns, *window, channels)


def window_unpartition(
    windows: torch.Tensor,  # [B x windows, S, T, C]
    grid: tuple[int, int],  # (H, W)
) -> torch.Tensor:  # [B, H, W, C]
    """Undo `window_partition`: put the windows back together and cut the padding off."""
    num_windows, *window, channels = windows.shape
    height, width = grid
    rows, columns = (_num_windows(length, side) for length, side in zip(grid, window, strict=True))
    batch_size = num_windows // (rows * columns)
    windows = windows.view(batch_size, rows, columns, *window, channels).transpose(2, 3)
    grid_of_windows = windows.reshape(batch_size, rows * window[0], columns * window[1], channels)
    if not is_open(height, width):
        return grid_of_windows[:, :height, :width]
    # A graph would ask of a slice whether it cuts anything off.
    places = [torch.arange(length, device=windows.device) for length in grid]
    return grid_of_windows.index_select(1, places[0]).index_select(2, places[1])


def _num_windows(length: int, side: int) -> int:
    """Of an axis, rounded up without negative numbers, as ONNX divides these in another way than Python."""
    return (length + side - 1) // side


def _split_padding(qkv: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A projection [B x H x W (+ 1), ...] as the grid's, [B, H, W, ...], and that of padding, [...], if any."""
    num_tokens = shape[0] * shape[1] * shape[2]
    if qkv.shape[0] == num_tokens:
        return qkv.unflatten(0, list(shape)), None
    tokens, padding = qkv.split([num_tokens, 1])
    return tokens.unflatten(0, list(shape)), padding[0]


def _windowed_attention(
    name: str,
    module: "SamAttention",
    shape: tuple[int, int, int],  # (B, H, W)
    qkv: torch.Tensor,  # [B x H x W (+ 1), 3C]
    table_h: torch.Tensor,  # [S, S, D]
    table_w: torch.Tensor,  # [T, T, D]
) -> torch.Tensor:  # [B, H, W, C]
    """Attention over all windows at once, by any implementation but the blockwise one."""
    window = (table_h.shape[0], table_w.shape[0])
    grid, padding = _split_padding(qkv, shape)
    windows = window_partition(grid, window, padding)  # [B x windows, S, T, 3C]
    query, key, value = split_heads(windows, module.num_heads)  # each [B x windows, A, N, D]
    rel_h, rel_w = relative_position_terms(query.unflatten(2, window), table_h, table_w)
    if name == "sdpa_folded":
        query, width, filling = (query * module.scaling).unflatten(2, window), value.shape[-1], 0
        if query.is_cuda:
            capability = torch.cuda.get_device_capability(query.device) if torch.cuda.is_available() else (0, 0)
            filling = kernel_filling(width + sum(window), query.dtype, capability, is_trained=query.requires_grad)
        query, key = fold_bias(query, key, rel_h, rel_w, filling)
        if not query.is_cuda or query.dtype.itemsize < 4:
            # Flash kernels ask for values as wide as keys; the one for float32 on CUDA does not.
            value = F.pad(value, (0, key.shape[-1] - width))
        output = sdpa_attention(module, query.flatten(2, 3), key, value, None, scaling=1.0)[0][..., :width]
    else:
        # Both are small; contiguous, they make their large sum contiguous as well, so that the view copies nothing.
        bias = rel_h.contiguous()[..., :, None] + rel_w.contiguous()[..., None, :]  # [B x windows, A, S, T, S, T]
        bias = bias.view(*query.shape[:3], key.shape[2])
        attend = attention_function(name)
        output = attend(module, query, key, value, bias, scaling=module.scaling, is_causal=False)[0]
    return window_unpartition(output.flatten(2).unflatten(1, window), shape[1:])


# Block by block, with a backward pass of its own.


@dataclass(frozen=True)
class _Windows:
    """Windows of one image side by side, all with as much padding, as the blockwise attention sees them.

    Letters: s and t rows and columns of a window that are not padding, G the covered heads of all windows.
    """

    place: tuple[slice, slice, slice]  # rows, columns and heads of the grid that they cover
    shape: tuple[int, ...]  # (windows below each other, windows beside each other, heads, s, t, D)
    query: torch.Tensor  # [G, s, t, D], only of tokens that are not padding; nobody looks at the others' output
    key: torch.Tensor  # [G, N, D], of all S x T tokens
    value: torch.Tensor  # [G, N, D]
    rel_h: torch.Tensor  # [G, s, t, S]
    rel_w: torch.Tensor  # [G, s, t, T]
    # In half precision, query and key with the bias folded in: with AMX in 0.6 of the time, in float32 in 2.3 times.
    folded: tuple[torch.Tensor, torch.Tensor] | None

    def gather(self, grid: torch.Tensor) -> torch.Tensor:
        """These windows of a grid [H, W, A, D] as [G, s, t, D]."""
        return _copy(self._by_window(grid), self.query.dtype).view(self.query.shape)

    def scatter(self, values: torch.Tensor, grid: torch.Tensor) -> None:
        """Put [G, s, t, D] into its place in a grid [H, W, A, D]."""
        self._by_window(grid).copy_(values.reshape(self.shape))

    def _by_window(self, grid: torch.Tensor) -> torch.Tensor:
        down, across, _, rows, columns, _ = self.shape
        windows = grid[self.place].unflatten(1, (across, columns)).unflatten(0, (down, rows))  # [., s, ., t, A, D]
        return windows.permute(0, 2, 4, 1, 3, 5)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Heads and rows of the queries whose logits are made at once: rows of half a block, and heads to fill it."""
        num_heads, num_rows, num_columns, _ = self.query.shape
        row_bytes = num_columns * self.key.shape[1] * self.key.element_size()
        rows = max(1, min(num_rows, BLOCK_BYTES // (2 * row_bytes)))
        heads = max(1, min(num_heads, BLOCK_BYTES // (rows * row_bytes)))
        return product(_steps(num_heads, heads), _steps(num_rows, rows))

    def weights(self, heads: slice, rows: slice, scratch: torch.Tensor) -> torch.Tensor:
        """The attention weights of a block, [g, n, N], in a scratch tensor, in which its logits are made before."""
        size = (*self.rel_h[heads, rows].shape, self.rel_w.shape[-1])  # [g, s, t, S, T]
        logits = _shaped(scratch, size).flatten(3).flatten(1, 2)
        if self.folded is not None:
            query, key = self.folded[0][heads, rows].flatten(1, 2), self.folded[1][heads].transpose(1, 2)
            # Less about the largest of each query, which changes no weight: those that count are near zero then, and
            # hardly rounded. A sample of 768 keys or more tells it, of every column, as its step is odd.
            largest = (query @ key[:, :, :: key.shape[2] // 768 | 1]).amax(dim=-1, keepdim=True)
            logits.copy_(-largest).baddbmm_(query, key)
        else:
            torch.add(self.rel_h[heads, rows, :, :, None], self.rel_w[heads, rows, :, None], out=logits.view(size))
            query, key = self.query[heads, rows].flatten(1, 2), self.key[heads]
            logits.baddbmm_(query, key.transpose(1, 2), alpha=self.query.shape[-1] ** -0.5)
        return torch.softmax(logits, dim=-1, out=logits)


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy in a dtype, in one pass."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _shaped(scratch: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The beginning of a scratch tensor in a shape; the tensor grows if it does not suffice."""
    size = torch.Size(shape).numel()
    return scratch.resize_(max(scratch.numel(), size))[:size].view(shape)


def _steps(length: int, step: int) -> list[slice]:
    """An axis in pieces of a length, the last one shorter."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _cuts(length: int, side: int) -> Iterator[tuple[slice, int, int]]:
    """An axis as whole windows and the rest: place, number of windows, and how much of each is not padding."""
    whole = length // side
    if whole:
        yield slice(0, whole * side), whole, side
    if length % side:
        yield slice(whole * side, length), 1, length % side


def _windows(
    grid: torch.Tensor,  # [H, W, 3, A, D]
    padding: torch.Tensor | None,  # [3, A, D]
    table_h: torch.Tensor,  # [S, S, D], in the dtype to compute in
    table_w: torch.Tensor,  # [T, T, D]
    *,
    copy_bytes: float,
) -> Iterator[_Windows]:
    """The windows of one image, some heads at a time: those without padding, at its edges, in the corner."""
    height, width, _, num_heads, head_dim = grid.shape
    window, dtype = (table_h.shape[0], table_w.shape[0]), table_h.dtype
    heads_at_once = max(1, int(min(num_heads, copy_bytes * num_heads // (grid.numel() * dtype.itemsize))))
    cuts = product(_steps(num_heads, heads_at_once), _cuts(height, window[0]), _cuts(width, window[1]))
    for heads, (rows, down, num_rows), (columns, across, num_columns) in cuts:
        real = grid[rows, columns, :, heads].unflatten(1, (across, num_columns)).unflatten(0, (down, num_rows))
        whole = real  # [windows below, S, windows beside, T, 3, A, D]
        if padding is not None and (num_rows, num_columns) != window:
            whole = padding[:, heads].repeat(down, window[0], across, window[1], 1, 1, 1)
            whole[:, :num_rows, :, :num_columns] = real
        # One copy here, or the matrix products of every block would make their own.
        query = _copy(real[:, :, :, :, 0].permute(0, 2, 4, 1, 3, 5), dtype)
        key, value = _copy(whole[:, :, :, :, 1:].permute(4, 0, 2, 5, 1, 3, 6), dtype).flatten(1, 3).flatten(2, 3)
        shape, query = query.shape, query.flatten(0, 2)
        rel_h, rel_w = relative_position_terms(query, table_h, table_w)
        folded = fold_bias(query * head_dim**-0.5, key, rel_h, rel_w) if dtype.itemsize < 4 else None
        yield _Windows((rows, columns, heads), tuple(shape), query, key, value, rel_h, rel_w, folded)


def _blockwise(
    qkv: torch.Tensor,  # [B x H x W (+ 1), 3C]
    table_h: torch.Tensor,  # [S, S, D]
    table_w: torch.Tensor,  # [T, T, D]
    num_heads: int,
    shape: Sequence[int],  # (B, H, W)
) -> torch.Tensor:  # [B, H, W, C]
    """Attention within windows of a grid, with relative positions."""
    grid, padding, tables = _prepare(qkv, table_h, table_w, num_heads, shape)
    output = qkv.new_empty(*shape, qkv.shape[-1] // 3)  # [B, H, W, C]
    scratch = tables[0].new_empty(0)
    for image, image_output in zip(grid, output.unflatten(-1, grid.shape[-2:]), strict=True):
        for windows in _windows(image, padding, *tables, copy_bytes=float("inf")):
            attended = torch.empty_like(windows.query)
            for heads, rows in windows.blocks():
                block = windows.weights(heads, rows, scratch) @ windows.value[heads]
                attended[heads, rows] = block.view(attended[heads, rows].shape)
            windows.scatter(attended, image_output)
    return output


class _BlockwiseAttention(torch.autograd.Function):
    """Attention within windows of a grid, with relative positions, block by block; see the top of this file.

    Inputs as `_windowed_attention` has them, module and shape last. That function, in plain steps, also gives what
    has no blocks of its own: derivatives of the backward pass, forward-mode derivatives, and `torch.func.vmap`.
    """

    @staticmethod
    def forward(
        qkv: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor, module: "SamAttention", shape: Sequence[int]
    ) -> torch.Tensor:
        return _blockwise(qkv, table_h, table_w, module.num_heads, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        *tensors, ctx.module, ctx.shape = inputs
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, table_h, table_w, output = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody wants to differentiate what comes out here.
            plain = partial(_windowed_attention, "eager", ctx.module, ctx.shape)
            gradients = torch.func.vjp(plain, qkv, table_h, table_w)[1](grad_output)
        else:
            sizes = (ctx.module.num_heads, ctx.shape)
            gradients = _blockwise_gradients(qkv, table_h, table_w, output, grad_output, *sizes)
        return *gradients, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        plain = partial(_windowed_attention, "eager", ctx.module, ctx.shape)
        pulled_back = torch.func.vjp(plain, *ctx.saved_tensors)
        pairs = zip(ctx.saved_tensors, tangents, strict=False)
        filled = [torch.zeros_like(part) if tangent is None else tangent for part, tangent in pairs]
        # The derivative forward is the transpose of that backward; `torch.func.jvp` must not be nested.
        return torch.func.vjp(pulled_back[1], torch.zeros_like(pulled_back[0]))[1](tuple(filled))[0].contiguous()

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[torch.Tensor, int]:
        *tensors, module, shape = inputs
        plain = partial(_windowed_attention, "eager", module, shape)
        return torch.func.vmap(plain, in_dims[:3])(*tensors), 0


def _prepare(
    qkv: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor, num_heads: int, shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]:
    """Grid [B, H, W, 3, A, D], padding [3, A, D], and the tables in the dtype to compute in."""
    grid, padding = _split_padding(qkv.unflatten(-1, (3, num_heads, -1)), shape)
    dtype = at_least_float32(qkv.dtype) if is_emulated(qkv.dtype, qkv.device) else qkv.dtype
    return grid, padding, (table_h.to(dtype), table_w.to(dtype))


def _blockwise_gradients(
    qkv: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    output: torch.Tensor,  # [B, H, W, C]
    grad_output: torch.Tensor,  # [B, H, W, C]
    num_heads: int,
    shape: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the projection and of both tables."""
    grid, padding, tables = _prepare(qkv, table_h, table_w, num_heads, shape)
    grad_qkv = torch.empty_like(qkv)
    grad_grid, grad_padding = _prepare(grad_qkv, table_h, table_w, num_heads, shape)[:2]
    # These are sums over many windows and blocks.
    dtype = at_least_float32(qkv.dtype)
    grad_h, grad_w = (torch.zeros_like(table, dtype=dtype) for table in tables)
    padded = None if padding is None else torch.zeros_like(padding, dtype=dtype)
    output, grad_output = (part.unflatten(-1, grid.shape[-2:]) for part in (output, grad_output))
    scratch = tables[0].new_empty(0), tables[0].new_empty(0)
    for index, image in enumerate(grid):
        for windows in _windows(image, padding, *tables, copy_bytes=COPY_BYTES):
            grad = windows.gather(grad_output[index])  # [G, s, t, D]
            delta = (grad.to(dtype) * windows.gather(output[index])).sum(-1, keepdim=True)  # [G, s, t, 1]
            grad_query, *grads, grad_rel_h, grad_rel_w = _window_gradients(windows, grad, delta, scratch)
            rows, columns = windows.query.shape[1:3]
            grad_query += torch.einsum("gsti,sid->gstd", grad_rel_h, tables[0][:rows])
            grad_query += torch.einsum("gstj,tjd->gstd", grad_rel_w, tables[1][:columns])
            grad_h[:rows] += torch.einsum("gsti,gstd->sid", grad_rel_h, windows.query)
            grad_w[:columns] += torch.einsum("gstj,gstd->tjd", grad_rel_w, windows.query)
            windows.scatter(grad_query, grad_grid[index, :, :, 0])
            for part, grad_part in enumerate(grads, start=1):
                real = _without_padding(grad_part, windows, None if padded is None else padded[part])
                windows.scatter(real, grad_grid[index, :, :, part])
    if grad_padding is not None and padded is not None:
        grad_padding.copy_(padded)
    return grad_qkv, grad_h.to(table_h.dtype), grad_w.to(table_w.dtype)


def _window_gradients(
    windows: _Windows, grad_output: torch.Tensor, delta: torch.Tensor, scratch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Gradients of query [G, s, t, D], key and value [G, N, D], rel_h and rel_w, from that of the output [G, s, t, D].

    With weights P and the output's gradient O, that of the logits is P * (O V^T - delta), where delta is the sum of
    O times the output over the width of a head.
    """
    scaling = windows.query.shape[-1] ** -0.5
    grad_query, grad_h, grad_w = (torch.empty_like(part) for part in (windows.query, windows.rel_h, windows.rel_w))
    dtype = at_least_float32(windows.key.dtype)
    grad_key, grad_value = (torch.zeros_like(part, dtype=dtype) for part in (windows.key, windows.value))
    # The difference is rounded once, and delta, in two parts, not at all.
    high = delta.to(grad_output.dtype)
    with_delta = torch.cat([grad_output, -high, (high - delta).to(high.dtype)], dim=-1)  # [G, s, t, D + 2]
    with_ones = F.pad(windows.value, (0, 2), value=1.0)  # [G, N, D + 2]
    for heads, rows in windows.blocks():
        query, grad = (part[heads, rows].flatten(1, 2) for part in (windows.query, grad_output))  # [g, n, D]
        weights = windows.weights(heads, rows, scratch[0])  # [g, n, N]
        grad_value[heads] += weights.transpose(1, 2) @ grad
        grad_logits = _shaped(scratch[1], weights.shape)
        torch.bmm(with_delta[heads, rows].flatten(1, 2), with_ones[heads].transpose(1, 2), out=grad_logits)
        grad_logits.mul_(weights)
        grad_query[heads, rows] = (grad_logits @ windows.key[heads]).mul_(scaling).view(grad_query[heads, rows].shape)
        grad_key[heads] += (grad_logits.transpose(1, 2) @ query).mul_(scaling)
        by_place = grad_logits.view(*grad_h[heads, rows].shape, -1)  # [g, s, t, S, T]
        grad_h[heads, rows] = by_place.sum(-1)
        grad_w[heads, rows] = by_place.sum(-2)
    return grad_query, grad_key, grad_value, grad_h, grad_w


def _without_padding(grad: torch.Tensor, windows: _Windows, padded: torch.Tensor | None) -> torch.Tensor:
    """The part [G, s, t, D] of a gradient [G, N, D] that is no padding's; that is added to `padded` [A, D]."""
    down, across, num_heads, rows, columns, head_dim = windows.shape
    grad = grad.unflatten(1, (windows.rel_h.shape[-1], windows.rel_w.shape[-1]))  # [G, S, T, D]
    real = grad[:, :rows, :columns]
    if padded is not None and real.shape != grad.shape:
        *_, covered = windows.place
        sums = grad.sum((1, 2)) - real.sum((1, 2))  # [G, D]
        padded[covered] += sums.view(down * across, num_heads, head_dim).sum(0)
    return real


# The same for compilers: two operators, so that a graph has one node each way in place of the loops.

_OPERATOR = re.sub(r"\W", "_", ascii(__name__)) + "::blockwise_attention"  # a checkpoint's copy has its own
_blockwise_operator = torch.library.custom_op(
    _OPERATOR,
    _blockwise,
    mutates_args=(),
    schema="(Tensor qkv, Tensor table_h, Tensor table_w, int num_heads, SymInt[] shape) -> Tensor",
)
_gradients_operator = torch.library.custom_op(
    f"{_OPERATOR}_gradients",
    _blockwise_gradients,
    mutates_args=(),
    schema="(Tensor qkv, Tensor table_h, Tensor table_w, Tensor output, Tensor grad_output, int num_heads, "
    "SymInt[] shape) -> (Tensor, Tensor, Tensor)",
)


@_blockwise_operator.register_fake
def _(qkv: torch.Tensor, table_h: Any, table_w: Any, num_heads: int, shape: Sequence[int]) -> torch.Tensor:
    return qkv.new_empty(*shape, qkv.shape[-1] // 3)


@_gradients_operator.register_fake
def _(qkv: torch.Tensor, table_h: torch.Tensor, table_w: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(qkv), torch.empty_like(table_h), torch.empty_like(table_w)


def _save_for_gradients(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.num_heads, ctx.shape = inputs
    ctx.save_for_backward(*tensors, output)


def _operator_backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _gradients_operator(*ctx.saved_tensors, grad_output.contiguous(), ctx.num_heads, ctx.shape)
    return *gradients, None, None


_blockwise_operator.register_autograd(_operator_backward, setup_context=_save_for_gradients)
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)  # which torch 2.6 does not tell


def _formulation(name: str, device: torch.device) -> str:
    """What `"sdpa"` means for attention with relative positions."""
    if name != "sdpa" or device.type not in ("cpu", "meta"):
        return "sdpa_folded" if name == "sdpa" else name
    is_compiled = torch.compiler.is_dynamo_compiling() and not _is_exporting()
    return "sdpa_masked" if device.type == "meta" or (is_recording() and not is_compiled) else "blockwise"


class SamAttention(nn.Module):
    """Attention over a grid with decomposed relative positions, within windows or to the whole page.

    Args:
        config: The SAM stage.
        table_size: Side of the grid that the relative-position tables are laid out for.
        window_size: Side of a window; 0 for none.
    """

    def __init__(self, config: DeepSeekOCRVisionSamConfig, *, table_size: int, window_size: int = 0):
        super().__init__()
        self.config = config
        self.window_size = window_size
        self.num_heads = config.num_attention_heads
        head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_size - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_size - 1, head_dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [B, H, W, C] -> [B, H, W, C]
        batch_size, height, width, channels = hidden_states.shape
        window = (self.window_size or height, self.window_size or width)
        name = _formulation(self.config._attn_implementation, hidden_states.device)
        is_operator = name == "blockwise" and torch.compiler.is_compiling()  # one for every size
        open_sizes = is_operator or is_open(height, width)
        tokens = hidden_states.flatten(0, 2)  # [B x H x W, C]
        if self.window_size and (open_sizes or height % window[0] or width % window[1]):
            # Windows at the edge are filled up with zeros, and no mask hides them: they take part as keys and values.
            # The released weights were trained so. One row of zeros at the end stands for all of them.
            tokens = torch.cat([tokens, tokens.new_zeros(1, channels)])
        qkv = self.qkv(tokens)  # [B x H x W (+ 1), 3C]
        resize = open_sizes and not self.window_size
        table_h = relative_positions(self.rel_pos_h, window[0], resize=resize).to(qkv.dtype)  # [S, S, D]
        table_w = relative_positions(self.rel_pos_w, window[1], resize=resize).to(qkv.dtype)  # [T, T, D]
        shape = (batch_size, height, width)
        if name == "blockwise":
            # Everything has one dtype by now, which autocast would change for some steps and not for others.
            with torch.autocast(qkv.device.type, enabled=False):
                if is_operator:
                    output = _blockwise_operator(qkv, table_h, table_w, self.num_heads, shape)
                else:
                    output = _BlockwiseAttention.apply(qkv, table_h, table_w, self, shape)
        else:
            output = _windowed_attention(name, self, shape, qkv, table_h, table_w)
        return self.proj(output)  # [B, H, W, C]


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
        self, hidden_states: torch.Tensor, *, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = split_heads(self.qkv_proj(hidden_states), self.num_heads)  # each [B, A, N, D]
        # Only the eager function makes the weights, so it serves whoever asks for them.
        attend = attention_function("eager" if output_attentions else self.config._attn_implementation)
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, is_causal=False)  # [B, N, A, D]
        return self.out_proj(output.reshape(hidden_states.shape)), weights
