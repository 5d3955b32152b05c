"""Which pages are trained on and which are held out: the data's own split, or one that keeps duplicates together."""

from collections.abc import Sequence
from typing import Any

import numpy as np


HELD_OUT_NAMES = ("validation", "test")


def own_split(names: Sequence[str]) -> tuple[str, str] | None:
    """The names of the splits to train on and to hold out, if the data has both.

    Raises:
        ValueError: There is no split to train on.
    """
    if "train" not in names:
        raise ValueError(f"The data has no split 'train' but {list(names)}.")
    held_out = next((name for name in HELD_OUT_NAMES if name in names), None)
    return None if held_out is None else ("train", held_out)


def random_split(
    digests: Sequence[str], texts: Sequence[Any], *, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Hold out a part of the rows, at least one; rows with the same image or the same text stay on one side.

    Args:
        digests: Of each row's image.
        texts: Of each row.
        fraction: Part of the rows to hold out.
        seed: Decides which.

    Returns:
        Rows to train on and rows held out, in order.

    Raises:
        ValueError: There are fewer than two rows, or they cannot be split without parting duplicates.
    """
    if len(digests) < 2:
        raise ValueError(
            f"The data has {len(digests)} pages; at least 2 are needed, one to train on and one held out."
        )
    wanted = min(max(1, round(len(digests) * fraction)), len(digests) - 1)
    groups = duplicate_groups(digests, texts)
    held_out: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) + len(groups[index]) <= wanted:
            held_out += groups[index]
    if not held_out:
        smallest = min(map(len, groups))
        if smallest == len(digests):
            raise ValueError(
                "All pages have the same image or text, directly or through others: none can be held out."
            )
        held_out = list(next(group for group in groups if len(group) == smallest))
    chosen = set(held_out)
    return [row for row in range(len(digests)) if row not in chosen], sorted(held_out)


def duplicate_groups(digests: Sequence[str], texts: Sequence[Any]) -> list[list[int]]:
    """Rows that hang together by equal images or texts, also through others."""
    leaders = list(range(len(digests)))

    def leader(row: int) -> int:
        while leaders[row] != row:
            leaders[row] = leaders[leaders[row]]
            row = leaders[row]
        return row

    for values in (digests, texts):
        first: dict[Any, int] = {}
        for row, value in enumerate(values):
            leaders[leader(row)] = leader(first.setdefault(value, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(digests)):
        groups.setdefault(leader(row), []).append(row)
    return list(groups.values())
