"""What the examples report with: a run's result, scores, tables, figures."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from files import replacing, write_text
from matplotlib.figure import Figure
from rapidfuzz.distance import Levenshtein


RIGHT, WRONG = "#1a7f37", "#c62828"
COLORS = ("#1f5fa8", "#d9822b")  # one a run


@dataclass
class Result:
    """What one run came to.

    Attributes:
        name: The run.
        read: What the model read on each held-out page.
        written: What is written there.
        history: Trainer's log: dictionaries with `step` and `loss` or `eval_loss`, and a summary at the end.
        trainable_parameters: Numbers that were trained, all in all.
        changed_encoder_tensors: Weights of the encoder that training changed.
        encoder_tensors: Weights of the encoder.
    """

    name: str
    read: list[str]
    written: list[str]
    history: list[dict]
    trainable_parameters: int
    changed_encoder_tensors: int
    encoder_tensors: int

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a result that `save` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))

    def save(self, path: Path) -> None:
        """Write the result atomically."""
        write_text(path, json.dumps(asdict(self), indent=1))

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number of the history."""
        points = [(entry["step"], entry[key]) for entry in self.history if key in entry]
        return [step for step, _ in points], [value for _, value in points]


# Scores


def page_accuracy(read: list[str], written: list[str]) -> float:
    """Part of the pages that were read without any mistake, line breaks included."""
    return sum(a == b for a, b in zip(read, written, strict=True)) / len(written)


def character_error_rate(read: list[str], written: list[str]) -> float:
    """Insertions, deletions and substitutions that turn what was read into what is written, a character written."""
    return edits(read, written) / sum(map(len, written))


def edits(read: Iterable[Sequence[str]], written: Iterable[Sequence[str]]) -> int:
    """Levenshtein's distance of texts, or of lists of words, summed up over pages."""
    return sum(Levenshtein.distance(a, b) for a, b in zip(read, written, strict=True))


def duration(result: Result) -> str:
    """How long a run trained, since it was last resumed; `Trainer` notes it when it ends by itself."""
    seconds = next((entry["train_runtime"] for entry in reversed(result.history) if "train_runtime" in entry), None)
    return "not measured" if seconds is None else f"{seconds:.0f} s"


def markdown_table(rows: list[tuple[str, ...]]) -> str:
    """A heading and rows as Markdown, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def device_name() -> str:
    """What it was trained on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


# Files


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
