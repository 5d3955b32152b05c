"""What a run came to, in numbers, and the report that says how they were measured."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from report import Result, character_error_rate, device_name, duration, edits, markdown_table, page_accuracy


PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "deepseek-ocr-vision")


@dataclass
class RunResult(Result):
    """What one run came to.

    Attributes:
        step: The step whose weights were saved.
        loss: The saved model's loss on held-out pages.
        seconds_per_page: How long the saved model read a page, of a batch its share.
        text_tokens_per_vision_token: Tokens of text on held-out pages for each token that the encoder makes of them.
    """

    step: int
    loss: float
    seconds_per_page: float
    text_tokens_per_vision_token: float


def word_error_rate(read: list[str], written: list[str]) -> float:
    """Insertions, deletions and substitutions of words, which white space separates, a word written."""
    words = [text.split() for text in written]
    return edits([text.split() for text in read], words) / sum(map(len, words))


def score_rows(results: list[RunResult]) -> list[tuple[str, ...]]:
    """The table of results: a heading, then rows of a name and one value a run."""

    def row(name: str, value: Any) -> tuple[str, ...]:
        return (name, *(value(result) for result in results))

    return [
        row("held-out pages", lambda r: f"encoder {r.name}"),
        row("character error rate", lambda r: f"{character_error_rate(r.read, r.written):.2%}"),
        row("word error rate", lambda r: f"{word_error_rate(r.read, r.written):.2%}"),
        row("pages read without a mistake", lambda r: f"{page_accuracy(r.read, r.written):.1%}"),
        row("seconds to read a page", lambda r: f"{r.seconds_per_page:.2g}"),
        row("text tokens for each vision token", lambda r: f"{r.text_tokens_per_vision_token:.2f}"),
        row("loss", lambda r: f"{r.loss:.4f}"),
        row("step that was saved", lambda r: f"{r.step:,}"),
        row("parameters trained", lambda r: f"{r.trainable_parameters:,}"),
        row("encoder tensors changed", lambda r: f"{r.changed_encoder_tensors} of {r.encoder_tensors}"),
        row("training", duration),
    ]


@dataclass
class Circumstances:
    """How results were measured.

    Attributes:
        data: Where the pages are from.
        pages: What is known of the pages: their number and size, and what was found in them.
        command: What was called.
        seed: The seed.
        seconds: How long it took.
        is_resumed: Whether it was cut off before.
        num_processes: How many processes trained together.
    """

    data: str
    pages: list[str]
    command: str
    seed: int
    seconds: float
    is_resumed: bool
    num_processes: int = 1


def explanation(results: list[RunResult]) -> str:
    """What the numbers mean, in words."""
    number = len(results[0].written)
    both = " Both runs start from the same weights and see the same pages in the same order." if results[1:] else ""
    return (
        f"{number} pages were held out; the saved model read them by `generate`, greedily. Error rates: insertions, "
        "deletions and substitutions that turn what was read into what is written, a character written, line breaks "
        f"included, and a word written.{both}"
    )


def measured_by(how: Circumstances) -> str:
    """Machine, time and versions, in words."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    since = " since the run was resumed, as are the times above," if how.is_resumed else " from start to end"
    processes = f"{how.num_processes} processes, " if how.num_processes > 1 else ""
    return (
        f"Seed {how.seed}; {how.seconds:.0f} s{since} on {processes}{os.cpu_count()} CPUs and {device_name()}; Python "
        f"{platform.python_version()}, {versions}."
    )


def how_equal(check: dict[str, Any] | None) -> str:
    """In words, what came of loading the saved encoder in a fresh process."""
    if check is None:
        return "`encoder/` was not loaded again."
    if "error" in check:
        return f"`encoder/` could not be loaded in a fresh process: {check['error']}"
    distance = "bit for bit equal to"
    if not check["equal"]:
        distance = f"at most {check['difference']:.1e} standard deviations from"
    return (
        f"`encoder/`, loaded by `AutoModel` and `AutoProcessor` in a new process, gives {check['num_pages']} held-out "
        f"pages tokens of shape {check['shape']}, {distance} those of the encoder that was trained."
    )


def format_report(results: list[RunResult], how: Circumstances, check: dict[str, Any] | None) -> str:
    """`report.md`: the results, how they were measured, and how to measure them again."""
    pages = "\n".join(f"- {line}" for line in how.pages)
    return f"""# A DeepSeek-OCR vision encoder, trained to read

{markdown_table(score_rows(results))}

{explanation(results)}

![losses](loss.png)

![held-out pages and what was read](predictions.png)

`report.html` has more pages, and opens in any browser.

## The pages

{pages}

Data: {how.data}

## The saved encoder

{how_equal(check)}

## How it was measured

    {how.command}

{measured_by(how)}
"""
