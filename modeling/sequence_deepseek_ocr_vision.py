"""From the tokens of pages and of their tiles to one row of tokens an image, in the order of the released model.

The tiles' tokens come first, row by row over the whole grid of tiles, then the page's. In the released sequence each
row ends with the special token `image_newline`, and the image with `view_seperator` (spelled so); the order is that of
DeepSeek-OCR's own code (`modeling_deepseekocr.py`).

Letters in the shapes: B images, T tiles of an image in R rows and K columns, H and W rows and columns of a grid of
tokens, N tokens, C channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class DeepSeekOCRVisionOutput(BaseModelOutputWithPooling):
    """What the encoder gives: transformers' output of a vision encoder, and with tiles three fields more.

    Attributes:
        last_hidden_state: [B, N, config.hidden_size], row-major over the page's grid of tokens; with tiles, row-major
            over the grid of the image's tiles first, and padded with zeros at the end.
        pooler_output: [B, config.hidden_size], the mean of an image's tokens.
        hidden_states: What enters the first CLIP layer and what leaves each, [B, N, C] (N + 1 with a class token, the
            first) of the page alone; the last one is `last_hidden_state`.
        attentions: [B, heads, N, N] of each CLIP layer (N + 1 with a class token).
        attention_mask: [B, N], true where `last_hidden_state` holds a token and no padding. `None` without tiles.
        local_hidden_states: The tiles' hidden states, as `hidden_states` are the pages'.
        local_attentions: The tiles' attention weights, as `attentions` are the pages'.
    """

    attention_mask: torch.Tensor | None = None
    local_hidden_states: tuple[torch.Tensor, ...] | None = None
    local_attentions: tuple[torch.Tensor, ...] | None = None


def flatten_views(
    *views: torch.Tensor,  # [..., H, W, C] each
    newline: torch.Tensor | None = None,  # [C], ends each row of a grid
    separator: torch.Tensor | None = None,  # [C], ends the image
) -> torch.Tensor:
    """Put the tiles' grid and the page's into one row of tokens, [..., N, C]: view by view, and in each row by row."""
    if newline is not None:
        views = tuple(torch.cat([view, newline.expand(*view.shape[:-2], 1, -1)], dim=-2) for view in views)
    parts = [view.flatten(-3, -2) for view in views]
    if separator is not None:
        parts.append(separator.expand(*parts[0].shape[:-2], 1, -1))
    return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def as_one_grid(tiles: torch.Tensor, columns: int, rows: int) -> torch.Tensor:
    """Put the grids of an image's tiles side by side and below each other: [R x K, H, W, C] -> [R x H, K x W, C]."""
    grids = tiles.unflatten(0, (rows, columns)).transpose(1, 2)  # [R, H, K, W, C]
    return grids.flatten(2, 3).flatten(0, 1)


def pad_and_concatenate(
    pages: torch.Tensor,  # [B, H, W, C]
    tiles: torch.Tensor,  # [all tiles, H, W, C]
    grids: list[tuple[int, int]],  # columns and rows of each image's tiles, 0 and 0 for none
    **special_tokens: torch.Tensor | None,  # as `flatten_views` takes them
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row of tokens an image, where each has tiles of its own, or none.

    An image without tiles is concatenated with none of them. That makes the tiles part of the graph, so that the
    backward pass of a process without tiles visits the same layers as that of one with some: processes that share
    weights wait for each other in each.

    Returns:
        The rows, padded with zeros at the end, [B, N, C]; the mask [B, N] of what is a token; each row's mean, [B, C].
    """
    if not grids:
        nothing = flatten_views(tiles, pages, **special_tokens)  # [0, N, C]
        return nothing, nothing.new_ones(nothing.shape[:2], dtype=torch.bool), nothing.mean(dim=1)
    of_each = tiles.split([columns * rows for columns, rows in grids])
    views = zip(pages, of_each, grids, strict=True)
    rows = [flatten_views(as_one_grid(own, *grid), page, **special_tokens) for page, own, grid in views]
    hidden_states = pad_sequence(rows, batch_first=True)
    # Made where the tokens are: an accelerator would wait for lengths from the host.
    mask = pad_sequence([row.new_ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    return hidden_states, mask, torch.stack([row.mean(dim=0) for row in rows])


def grids_of_tiles(
    num_local_patches: Any, patches_grid: Any, *, pages: torch.Tensor, tiles: torch.Tensor | None
) -> list[tuple[int, int]] | None:
    """Columns and rows of each image's tiles, 0 and 0 where it has none; `None` where no tiles are given at all."""
    if tiles is None:
        if num_local_patches is not None and any(_integers("num_local_patches", num_local_patches, depth=1)):
            raise ValueError(f"`num_local_patches` is {num_local_patches}, but there are no `pixel_values_local`.")
        return None
    counts = _integers("num_local_patches", num_local_patches, depth=1)
    grids = _integers("patches_grid", patches_grid, depth=2)
    for name, entries in {"num_local_patches": counts, "patches_grid": grids}.items():
        if len(entries) != len(pages):
            raise ValueError(f"`{name}` has {len(entries)} entries for {len(pages)} images in `pixel_values`.")
    for index, (count, grid) in enumerate(zip(counts, grids, strict=True)):
        if count < 0 or len(grid) != 2 or (count > 0 and (min(grid) < 1 or grid[0] * grid[1] != count)):
            raise ValueError(
                f"`patches_grid[{index}]` is {grid} and `num_local_patches[{index}]` is {count}; they have to be the "
                "columns and rows of an image's tiles, and the product of both."
            )
    if sum(counts) != len(tiles):
        given = f"`pixel_values_local` has {len(tiles)} tiles"
        raise ValueError(f"`num_local_patches` adds up to {sum(counts)}, but {given}.")
    return [tuple(grid) if count else (0, 0) for count, grid in zip(counts, grids, strict=True)]


def _integers(name: str, value: Any, *, depth: int) -> list:
    """A list of integers, or a list of such lists, out of whatever holds them."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, list | tuple):
        shape = "one integer an image" if depth == 1 else "two integers, columns and rows, an image"
        raise TypeError(f"`{name}` is {value!r}; with `pixel_values_local` it has to be a list or tensor of {shape}.")
    if depth > 1:
        return [_integers(f"{name}[{index}]", entry, depth=depth - 1) for index, entry in enumerate(listed)]
    entries = [entry.item() if isinstance(entry, torch.Tensor) and entry.ndim == 0 else entry for entry in listed]
    if not all(type(entry) is int for entry in entries):
        raise TypeError(f"`{name}` is {value!r}; it has to hold integers.")
    return entries
