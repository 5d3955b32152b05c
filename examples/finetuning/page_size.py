"""How large pages are: what the encoder will see of their text, and the size that follows from it."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import TOKEN_SIZE


READABLE_HEIGHT = 12  # pixels of a line that a page size is chosen for
SMALLEST_HEIGHT = 8  # pixels of a line, below which people cannot read it either
MOST_TEXT_TOKENS = 10  # a token of the page; DeepSeek-OCR (arXiv 2510.18234, figure 1) loses precision beyond
SIZES = range(128, 1280 + 1, TOKEN_SIZE)
LARGEST_MEASURED = 2048  # pixels
INK_CONTRAST = 64  # levels of grey between ink and paper
LEAST_INK = 0.002  # part of a row's pixels that makes it part of a line


def line_height(image: Image.Image) -> float | None:
    """The height of a line of text in pixels, the median of the runs of rows that have ink; `None` of a blank page."""
    scale = max(1.0, max(image.size) / LARGEST_MEASURED)
    gray = image.convert("L").resize((max(1, round(image.width / scale)), max(1, round(image.height / scale))))
    levels = np.asarray(gray, dtype=np.int16)
    ink = np.abs(levels - np.median(levels)) > INK_CONTRAST
    rows = np.concatenate([[False], ink.mean(axis=1) > LEAST_INK, [False]])
    edges = np.flatnonzero(rows[1:] != rows[:-1])
    heights = edges[1::2] - edges[::2]
    heights = heights[heights > 2]  # what is thinner is a rule or dirt
    return float(np.median(heights) * scale) if len(heights) else None


def letter_height(shape: tuple[int, int], num_characters: int, measured: float | None) -> float:
    """About how high the letters of a page are, in its own pixels.

    Letters cannot be larger than the page has room for, each twice as high as it is wide. Lines that were measured may
    be several columns at once.
    """
    height, width = shape
    room = math.sqrt(2 * height * width / max(1, num_characters))
    return room if measured is None else min(room, measured)


def small_letters(heights: Sequence[float]) -> float:
    """The height that nine of ten pages reach."""
    return float(np.quantile(np.asarray(heights), 0.1))


def fitting_size(shapes: Sequence[tuple[int, int]], heights: Sequence[float]) -> int:
    """The smallest page size on which the lines of nine of ten pages are high enough to be read.

    Args:
        shapes: Height and width of pages.
        heights: Height of their lines.
    """
    for size in SIZES:
        seen = [height * size / max(shape) for shape, height in zip(shapes, heights, strict=True)]
        if small_letters(seen) >= READABLE_HEIGHT:
            return size
    return SIZES[-1]
