"""What the examples train on: pages of handwritten digits that need no download.

The digits are the 1,797 scans, 8 x 8 pixels in 17 levels of grey, that scikit-learn carries as `load_digits`: the test
part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning Repository,
1998). They are split into scans for training and scans held out *before* any page is made, so no scan on a held-out
page was ever seen in training.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import TOKEN_SIZE


CREDIT = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, as "
    "carried by scikit-learn (`load_digits`)"
)
SPLITS = ("train", "held_out")
NUM_TRAINING_SCANS = 1400
SCAN_SIDES = range(44, 61)  # pixels that a scan may measure on the page


# Handwritten digits


@dataclass(frozen=True)
class Scans:
    """Scanned digits.

    Attributes:
        images: S grey images of 8 x 8 pixels, black ink on white paper.
        digits: What each shows, 0 to 9.
        indexes: Which of `load_digits` each is.
    """

    images: list[Image.Image]
    digits: list[int]
    indexes: list[int]


def split_scans(seed: int) -> dict[str, Scans]:
    """Shuffle the 1,797 scans and split them: 1,400 under `"train"`, the other 397 under `"held_out"`."""
    digits = load_digits()
    paper_minus_ink = 255 - np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    order = np.random.default_rng(seed).permutation(len(paper_minus_ink))
    parts = zip(SPLITS, np.split(order, [NUM_TRAINING_SCANS]), strict=True)
    return {
        split: Scans([Image.fromarray(paper_minus_ink[i]) for i in part], digits.target[part].tolist(), part.tolist())
        for split, part in parts
    }


class HandwrittenPages(Dataset):
    """Pages with handwritten digits, drawn when asked for.

    A page is divided into cells of 64 x 64 pixels, as many as the encoder gives tokens. At least half of them, chosen
    at random, hold one digit, of random size and at a random place in the cell. The text is what is read row by row
    from top to bottom, each row from left to right, with a newline between rows and nothing for an empty cell or row.

    Page `index` follows from the seed, the split and `index` alone, so it is the same in every process and epoch.

    Args:
        scans: What the pages are made of.
        num_pages: Number of pages.
        page_size: Side of a page in pixels, a multiple of 64.
        seed: Any integer from 0 on.
        split: Tells the pages of one split from those of another.
    """

    def __init__(
        self, scans: Scans, *, num_pages: int, page_size: int, seed: int, split: Literal["train", "held_out"]
    ):
        if page_size < TOKEN_SIZE or page_size % TOKEN_SIZE:
            raise ValueError(f"`page_size` is {page_size}; it has to be a positive multiple of {TOKEN_SIZE}.")
        self.scans = scans
        self.num_pages = num_pages
        self.page_size = page_size
        self.stream = (seed, SPLITS.index(split))

    def __len__(self) -> int:
        return self.num_pages

    def __getitem__(self, index: int) -> dict:
        """Page `index`: `image`, a PIL image in RGB, and `text`."""
        if not 0 <= index < self.num_pages:
            raise IndexError(f"There is no page {index}; there are {self.num_pages}.")
        rng = np.random.default_rng([*self.stream, index])
        digits = self.choose_digits(rng)
        rows = [[str(self.scans.digits[scan]) for (row, _), scan in digits if row == wanted] for wanted in self.rows()]
        return {"image": self.draw(rng, digits), "text": "\n".join("".join(row) for row in rows if row)}

    def rows(self) -> range:
        """The rows of cells; there are as many columns."""
        return range(self.page_size // TOKEN_SIZE)

    def choose_digits(self, rng: np.random.Generator) -> list[tuple[tuple[int, int], int]]:
        """Choose what is on a page: (row, column) of a cell and the scan in it, in the order of reading."""
        cells = [(row, column) for row in self.rows() for column in self.rows()]
        number = rng.integers(-(-len(cells) // 2), len(cells) + 1)
        chosen = np.sort(rng.choice(len(cells), size=number, replace=False))
        scans = rng.integers(len(self.scans.digits), size=number).tolist()
        return [(cells[cell], scan) for cell, scan in zip(chosen, scans, strict=True)]

    def draw(self, rng: np.random.Generator, digits: list[tuple[tuple[int, int], int]]) -> Image.Image:
        """Draw the digits, each somewhere in its cell."""
        page = Image.new("L", (self.page_size, self.page_size), color=255)
        for (row, column), scan in digits:
            side = int(rng.choice(SCAN_SIDES))
            left, top = rng.integers(0, TOKEN_SIZE - side + 1, size=2).tolist()
            image = self.scans.images[scan].resize((side, side), Image.Resampling.BICUBIC)
            page.paste(image, (TOKEN_SIZE * column + left, TOKEN_SIZE * row + top))
        return page.convert("RGB")


def load_handwritten_pages(
    *, num_pages: int, num_held_out_pages: int, page_size: int, seed: int
) -> tuple[HandwrittenPages, HandwrittenPages]:
    """Pages for training and pages held out, from scans that do not meet."""
    scans = split_scans(seed)
    numbers = zip(SPLITS, (num_pages, num_held_out_pages), strict=True)
    train, held_out = (
        HandwrittenPages(scans[split], num_pages=number, page_size=page_size, seed=seed, split=split)
        for split, number in numbers
    )
    return train, held_out
