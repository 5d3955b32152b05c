"""How a large image is cut into tiles, as in the released model's mode Gundam (arXiv 2510.18234, section 3.2)."""

from functools import lru_cache

import torch


MIN_TILES = 2
"""An image that is cut at all is cut into at least so many."""


def tile_grid(height: int, width: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The grid of tiles that an image is resized to, as the released code's `dynamic_preprocess` chooses it.

    Of all grids of 2 to `max_tiles` tiles, the one whose aspect ratio is nearest to the image's. Of two that are
    equally near, the one with more tiles, if the image has more than half as many pixels.

    Args:
        height: The image's, in pixels.
        width: The image's, in pixels.
        tile_size: Side of a tile in pixels.
        max_tiles: Tiles that an image is cut into at the most.

    Returns:
        Columns and rows; 1 and 1 for an image that is no larger than a tile, which is not cut.
    """
    if max(height, width) <= tile_size:
        return 1, 1
    nearest, least_distance = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        distance = abs(width / height - columns / rows)
        fills_more = height * width > 0.5 * tile_size * tile_size * columns * rows
        if distance < least_distance or (distance == least_distance and fills_more):
            nearest, least_distance = (columns, rows), distance
    return nearest


@lru_cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Columns and rows of every grid, fewer tiles first."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if MIN_TILES <= columns * rows <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def cut(images: torch.Tensor, tile_size: int) -> torch.Tensor:
    """Cut images of one size into tiles, in reading order: [B, 3, R x S, C x S] -> [B, R x C, 3, S, S]."""
    grid = images.unflatten(3, (-1, tile_size)).unflatten(2, (-1, tile_size))  # [B, 3, R, S, C, S]
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


__all__ = ["MIN_TILES", "cut", "tile_grid"]
