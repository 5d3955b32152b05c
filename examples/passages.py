"""What `optical_memory.py` trains on: passages of long texts, drawn on pages.

The texts are the topics of Python's own documentation, which every Python carries as `pydoc_data.topics`, or the
user's. Whole texts are held out *before* any passage is chosen.
"""

from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from deepseek_ocr_vision.composites import IMAGE_TOKEN
from deepseek_ocr_vision.processing.text_pages import TextRenderer


SPLITS = ("train", "held_out")
PROMPT = "\n"  # what the passage comes after, also where there is no page before it


def read_texts(files: list[str]) -> list[str]:
    """The user's texts, or the topics of Python's documentation."""
    if not files:
        return sorted(set(topics.values()))
    if len(files) < 2:
        raise ValueError(f"--text names {files}; at least two files are needed, since whole texts are held out.")
    return [Path(file).read_text("utf-8") for file in files]


def split_texts(texts: list[str], *, held_out_fraction: float, seed: int) -> dict[str, list[str]]:
    """Hold out whole texts, chosen by `seed`; white space becomes single spaces.

    Texts quote each other, and a chapter may be there once more as a part of another. So what is held out is taken out
    of the texts to train on as well, paragraph by paragraph.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"--held_out_fraction is {held_out_fraction}; it has to be between 0 and 1.")
    shuffled = [paragraphs(texts[index]) for index in np.random.default_rng(seed).permutation(len(texts))]
    sizes = np.cumsum([sum(map(len, text)) for text in shuffled])
    number = 1 + int(np.searchsorted(sizes[:-2], held_out_fraction * sizes[-1]))
    held_out = set().union(*shuffled[:number])
    to_train_on = [[part for part in text if part not in held_out] for text in shuffled[number:]]
    splits = zip(SPLITS, (to_train_on, shuffled[:number]), strict=True)
    return {split: [" ".join(text) for text in documents if text] for split, documents in splits}


def paragraphs(text: str) -> list[str]:
    """What stands between empty lines, its white space made single spaces."""
    parts = (" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n"))
    return [part for part in parts if part]


class Passages(Dataset):
    """Passages of texts, drawn on pages when asked for.

    Passage `index` begins at a random word and goes on until its pages are full or the text ends. It follows from the
    seed, the split and `index` alone, so it is the same in every process and after an interruption.

    Args:
        texts: What to choose from; long ones are chosen more often.
        renderer: Draws the pages.
        num_passages: Number of passages.
        pages_per_passage: Pages that a passage fills.
        seed: Any integer from 0 on.
        split: Tells the passages of one split from those of another.
        blind_fraction: Part of the passages that come without their pages.
    """

    def __init__(
        self,
        texts: list[str],
        *,
        renderer: TextRenderer,
        num_passages: int,
        pages_per_passage: int,
        seed: int,
        split: Literal["train", "held_out"],
        blind_fraction: float = 0.0,
    ):
        if not any(texts):
            raise ValueError(f"There is no text in the split {split!r}.")
        self.texts = texts
        self.ends = np.cumsum([len(text) for text in texts])
        self.renderer = renderer
        self.num_passages = num_passages
        self.pages_per_passage = pages_per_passage
        self.stream = (seed, SPLITS.index(split))
        self.blind_fraction = blind_fraction

    def __len__(self) -> int:
        return self.num_passages

    def __getitem__(self, index: int) -> dict:
        """Passage `index`: its pages under `images`, the `prompt`, and the `answer`, which is what is on the pages."""
        if not 0 <= index < self.num_passages:
            raise IndexError(f"There is no passage {index}; there are {self.num_passages}.")
        rng = np.random.default_rng([*self.stream, index])
        pages = list(islice(self.renderer.pages(self.choose(rng)), self.pages_per_passage))
        answer = "\n".join(page.text for page in pages)
        is_blind = rng.random() < self.blind_fraction
        return as_sample([] if is_blind else [page.image for page in pages], answer)

    def choose(self, rng: np.random.Generator) -> str:
        """What follows a random word of a random text, as much as could be on the pages and no more."""
        place = int(rng.integers(self.ends[-1]))
        text_index = int(np.searchsorted(self.ends, place, side="right"))
        text = self.texts[text_index]
        start = text.find(" ", place - int(self.ends[text_index])) + 1  # after the last word: the beginning
        # No character is narrower than a pixel.
        most = self.pages_per_passage * self.renderer.lines_per_page * (self.renderer.line_width + 1)
        return text[start : start + most]


# Samples


def as_sample(images: list, answer: str) -> dict:
    """A passage as the collator takes it."""
    return {"images": images, "prompt": IMAGE_TOKEN * len(images) + PROMPT, "answer": answer}


def without_pages(samples: list[dict]) -> list[dict]:
    """The same passages with nothing to read them from."""
    return [as_sample([], sample["answer"]) for sample in samples]


def with_pages_of_another(samples: list[dict]) -> list[dict]:
    """Each passage with the pages of the one before it."""
    return [as_sample(samples[index - 1]["images"], sample["answer"]) for index, sample in enumerate(samples)]
