"""What the example leaves for people: scores, two pictures and `report.md`."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import torch
from files import replacing, write_text
from matplotlib.figure import Figure
from torch.utils.data import Dataset


NUM_SHOWN_PAGES = 20
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
    def load(cls, path: Path) -> "Result":
        """Read a result that `save` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))

    def save(self, path: Path) -> None:
        """Write the result in one step."""
        write_text(path, json.dumps(asdict(self), indent=1))

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number of the history."""
        points = [(entry["step"], entry[key]) for entry in self.history if key in entry]
        return [step for step, _ in points], [value for _, value in points]


# Scores


def character_accuracy(read: list[str], written: list[str]) -> float:
    """Part of the written characters, white space aside, that were read right and in their place."""
    right = total = 0
    for read_text, written_text in zip(read, written, strict=True):
        expected = "".join(written_text.split())
        right += sum(a == b for a, b in zip("".join(read_text.split()), expected, strict=False))
        total += len(expected)
    return right / total


def page_accuracy(read: list[str], written: list[str]) -> float:
    """Part of the pages that were read without any mistake, line breaks included."""
    return sum(a == b for a, b in zip(read, written, strict=True)) / len(written)


def character_error_rate(read: list[str], written: list[str]) -> float:
    """Edits that turn what was read into what is written, a character written."""
    edits = sum(edit_distance(a, b) for a, b in zip(read, written, strict=True))
    return edits / sum(map(len, written))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: least insertions, deletions and substitutions."""
    distances = list(range(len(second) + 1))
    for row, a in enumerate(first, start=1):
        diagonal, distances[0] = distances[0], row
        for column, b in enumerate(second, start=1):
            substituted = diagonal + (a != b)
            diagonal = distances[column]
            distances[column] = min(substituted, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


def score_rows(results: list[Result], unit: str) -> list[tuple[str, ...]]:
    """The table of results: a heading, then rows of a name and one value a run."""

    def row(name: str, value) -> tuple[str, ...]:
        return (name, *(value(result) for result in results))

    return [
        row("held-out pages", lambda r: f"encoder {r.name}"),
        row(f"{unit} accuracy", lambda r: f"{character_accuracy(r.read, r.written):.2%}"),
        row("pages read without a mistake", lambda r: f"{page_accuracy(r.read, r.written):.1%}"),
        row("character error rate", lambda r: f"{character_error_rate(r.read, r.written):.2%}"),
        row("loss", lambda r: f"{(r.curve('eval_loss')[1] or [float('nan')])[-1]:.4f}"),
        row("parameters trained", lambda r: f"{r.trainable_parameters:,}"),
        row("encoder tensors changed", lambda r: f"{r.changed_encoder_tensors} of {r.encoder_tensors}"),
        row("training", duration),
    ]


def duration(result: Result) -> str:
    """How long a run trained, since it was last resumed; `Trainer` notes it when it ends by itself."""
    seconds = result.history[-1].get("train_runtime")
    return "not measured" if seconds is None else f"{seconds:.0f} s"


def format_scores(results: list[Result], unit: str) -> str:
    """The table of results as Markdown, its columns aligned."""
    return markdown_table(score_rows(results, unit))


def markdown_table(rows: list[tuple[str, ...]]) -> str:
    """A heading and rows as Markdown, the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def format_report(
    results: list[Result],
    *,
    unit: str,
    data: str,
    check: dict,
    command: str,
    seed: int,
    seconds: float,
    is_resumed: bool,
) -> str:
    """`report.md`: the results, how they were measured, and how to measure them again."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "pillow", "deepseek-ocr-vision")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    number = len(results[0].written)
    since = " since the run was resumed, as are the times above," if is_resumed else " from start to end"
    return f"""# A DeepSeek-OCR vision encoder, trained to read

{format_scores(results, unit)}

{number} pages were held out; the model read them by `generate`, greedily. {unit.capitalize()} accuracy: part of the
characters on them, white space aside, that were read right and in their place. Error rate: insertions, deletions and
substitutions that turn what was read into what is written, a character written. Both runs start from the same weights
and see the same pages in the same order.

![losses](loss.png)

![held-out pages and what was read](predictions.png)

## The saved encoder

`encoder/`, loaded by `AutoModel` and `AutoProcessor` in a fresh process, gives {check["num_pages"]} held-out pages
tokens of shape {check["shape"]}, {how_equal(check)} those of the encoder that was trained.

## How it was measured

    {command}

Seed {seed}; {seconds:.0f} s{since} on {os.cpu_count()} CPUs and {device_name()}; Python
{platform.python_version()}, {versions}.

Data: {data}
"""


def device_name() -> str:
    """What it was trained on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def how_equal(check: dict) -> str:
    """In words, how near the loaded encoder's tokens are to the trained one's."""
    if check["equal"]:
        return "bit for bit equal to"
    return f"at most {check['difference']:.1e} standard deviations from"


# Pictures


def draw_losses(results: list[Result], path: Path) -> None:
    """Draw the losses of all runs over the steps, thin on training batches and with dots on held-out pages, and below
    them the learning rate.
    """
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for result, color in zip(results, COLORS, strict=False):
        run = f"encoder {result.name}"
        losses.plot(*result.curve("loss"), color=color, alpha=0.45, label=f"{run}, training pages")
        losses.plot(*result.curve("eval_loss"), "o-", color=color, ms=4, label=f"{run}, held-out pages")
        rates.plot(*result.curve("learning_rate"), color=color)
    losses.set(ylabel="cross entropy, nats a token", yscale="log")
    losses.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    losses.grid(which="both", alpha=0.2)
    losses.legend(frameon=False, fontsize="small")
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.grid(alpha=0.2)
    save_figure(figure, path)


def draw_predictions(result: Result, pages: Dataset, path: Path) -> None:
    """Draw the first held-out pages, with what was read beneath each and, where that is wrong, what is written."""
    number = min(NUM_SHOWN_PAGES, len(pages))
    columns = min(5, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(2 * columns, 2.6 * rows + 0.4), layout="constrained")
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if index < number:
            draw_page(axes, pages[index]["image"], result.read[index], result.written[index])
    right = page_accuracy(result.read, result.written)
    figure.suptitle(f"The first {number} held-out pages and what was read; {right:.1%} of all pages are right")
    save_figure(figure, path)


def draw_page(axes: mpl.axes.Axes, image, read: str, written: str) -> None:
    """Draw one page with its caption."""
    axes.imshow(image, cmap="gray")
    axes.add_patch(mpl.patches.Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, color="#bbbbbb"))
    is_right = read == written
    caption = shown(read) if is_right else f"{shown(read)}\nis {shown(written)}"
    axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", color=RIGHT if is_right else WRONG)


def shown(text: str, most: int = 24) -> str:
    """A text on one line, shortened, safe to draw."""
    line = " / ".join(text.splitlines()).replace("$", r"\$")
    line = line if len(line) <= most else line[: most - 1] + "…"
    return line or "(nothing)"


# Files


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture in one step."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
