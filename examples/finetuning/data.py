"""The pages of a run: your own, looked at and split, or pages of handwritten digits."""

import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from pages import load_handwritten_pages
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from deepseek_ocr_vision.composites import build_processor
from deepseek_ocr_vision.composites.llava import text_config
from finetuning.arguments import ModelArguments, PageArguments
from finetuning.inspection import Inspection, fingerprint, inspect, overlaps, raise_errors, summarised, too_long
from finetuning.own_pages import Finding, OwnPages, Table, open_tables
from finetuning.page_size import (
    MOST_TEXT_TOKENS,
    SMALLEST_HEIGHT,
    TOKEN_SIZE,
    fitting_size,
    letter_height,
    small_letters,
)
from finetuning.processes import on_main_process
from finetuning.splits import own_split, random_split


logger = logging.getLogger("finetune")

BYTES_A_TOKEN = 4  # of the tokenizers of large language models, on English text


@dataclass
class Plan:
    """What was decided about the user's pages, in the main process for all of them.

    Attributes:
        rows: For `"train"` and `"held_out"` the name of the table, and its rows.
        page_size: Side of a page in pixels.
        content: A digest of all pages.
        notes: What to say of them.
        warnings: What else was found in them.
    """

    rows: dict[str, tuple[str, list[int]]]
    page_size: int
    content: str
    notes: list[str]
    warnings: list[str] = field(default_factory=list)


def load_pages(
    page_arguments: PageArguments, model_arguments: ModelArguments, *, seed: int, show_progress: bool
) -> tuple[dict[str, Dataset], LlavaProcessor, Plan]:
    """The pages to train on and the pages held out, what makes inputs of them, and what is known of them.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The data cannot be trained on; the message says why and where, all at once.
    """
    parts = {"encoder": model_arguments.encoder, "language_model": model_arguments.language_model}
    processor = build_processor(**parts, page_size=page_arguments.page_size)
    if page_arguments.data is None:
        return *handwritten(page_arguments, processor, seed=seed), handwritten_plan(page_arguments, processor)
    columns = {"image_column": page_arguments.image_column, "text_column": page_arguments.text_column}
    tables, findings = open_tables(page_arguments.data, **columns)

    def make_plan() -> Plan:
        planner = Planner(page_arguments, model_arguments, processor, seed=seed, show_progress=show_progress)
        return planner.plan(tables, findings)

    plan = on_main_process(make_plan)
    for line in plan.notes:
        logger.info("%s", line)
    for line in plan.warnings:
        logger.warning("%s", line)
    pages = {side: OwnPages(tables[name], rows) for side, (name, rows) in plan.rows.items()}
    return pages, build_processor(**parts, page_size=plan.page_size), plan


def handwritten(
    page_arguments: PageArguments, processor: LlavaProcessor, *, seed: int
) -> tuple[dict[str, Dataset], LlavaProcessor]:
    """Pages of handwritten digits."""
    train, held_out = load_handwritten_pages(
        num_pages=page_arguments.num_pages,
        num_held_out_pages=page_arguments.num_held_out_pages,
        page_size=processor.image_processor.size["height"],
        seed=seed,
    )
    return {"train": train, "held_out": held_out}, processor


def handwritten_plan(page_arguments: PageArguments, processor: LlavaProcessor) -> Plan:
    """What is known of them without looking."""
    size = processor.image_processor.size["height"]
    notes = [
        f"{page_arguments.num_pages:,} pages to train on, {page_arguments.num_held_out_pages:,} held out, of scans "
        "that are on no page to train on.",
        f"A page is {size} x {size} pixels, {(size // TOKEN_SIZE) ** 2} tokens.",
    ]
    return Plan({}, size, "", notes)


class Planner:
    """Looks at the user's pages and decides about their split and size.

    Args:
        page_arguments: The pages.
        model_arguments: The model.
        processor: For pages of some size; its tokenizer has to know the texts.
        seed: Decides the split where the data has none.
        show_progress: Whether to show a bar.
    """

    def __init__(
        self,
        page_arguments: PageArguments,
        model_arguments: ModelArguments,
        processor: LlavaProcessor,
        *,
        seed: int,
        show_progress: bool,
    ):
        self.page_arguments, self.model_arguments = page_arguments, model_arguments
        self.processor, self.seed, self.show_progress = processor, seed, show_progress

    def plan(self, tables: dict[str, Table], findings: list[Finding]) -> Plan:
        """Look at everything once.

        Raises:
            ValueError: Something cannot be trained on.
        """
        names = own_split(list(tables))
        used = {name: tables[name] for name in names or ("train",)}
        looks = {
            name: inspect(table, name=name, processor=self.processor, show_progress=self.show_progress)
            for name, table in used.items()
        }
        size = self.page_size(used, looks)
        sized = build_processor(
            encoder=self.model_arguments.encoder, language_model=self.model_arguments.language_model, page_size=size
        )
        findings = [*findings, *(finding for look in looks.values() for finding in look.findings)]
        findings += self.lengths(used, looks, sized)
        raise_errors(findings)
        rows, note = self.split(used, looks, names)
        if names is not None:
            findings += overlaps(used, looks, names[1])
        sizes, warnings = self.sizes(used, looks, sized)
        notes = [note, *unused(tables, used), sizes]
        warnings += summarised(findings)
        content = {name: (look.digests, used[name].texts) for name, look in looks.items()}
        return Plan(rows, size, fingerprint(content), notes, warnings)

    def split(
        self, tables: dict[str, Table], looks: dict[str, Inspection], names: tuple[str, str] | None
    ) -> tuple[dict[str, tuple[str, list[int]]], str]:
        """Rows for both sides, and a sentence about it."""
        if names is not None:
            train, held_out = (list(range(len(tables[name]))) for name in names)
            if not train or not held_out:
                raise ValueError(f"The data has {len(train)} pages to train on and {len(held_out)} held out.")
            how = f"the data's own split {names[1]!r}"
        else:
            fraction = self.page_arguments.held_out_fraction
            digests, texts = looks["train"].digests, tables["train"].texts
            train, held_out = random_split(digests, texts, fraction=fraction, seed=self.seed)
            names = ("train", "train")
            how = "chosen at random, equal images and equal texts on one side"
        note = f"{len(train):,} pages to train on, {len(held_out):,} held out, {how}."
        return {"train": (names[0], train), "held_out": (names[1], held_out)}, note

    def page_size(self, tables: dict[str, Table], looks: dict[str, Inspection]) -> int:
        """The size asked for, or the encoder's; for a new one what the text needs."""
        current = self.processor.image_processor.size["height"]
        if self.page_arguments.page_size is not None or self.model_arguments.encoder is not None:
            return current
        shapes, heights = measured(tables, looks)
        return fitting_size(shapes, heights) if shapes else current

    def lengths(
        self, tables: dict[str, Table], looks: dict[str, Inspection], processor: LlavaProcessor
    ) -> Iterator[Finding]:
        """Texts that are too long for the language model."""
        config = text_config(self.model_arguments.language_model, processor.tokenizer)
        positions = getattr(config, "max_position_embeddings", None)
        for name, table in tables.items():
            yield from too_long(table, looks[name], image_tokens=tokens_of(processor), positions=positions)

    def sizes(
        self, tables: dict[str, Table], looks: dict[str, Inspection], processor: LlavaProcessor
    ) -> tuple[str, list[str]]:
        """A sentence about the pages' size, and warnings where text becomes too small."""
        size, tokens = processor.image_processor.size["height"], tokens_of(processor)
        shapes, heights = measured(tables, looks)
        if not shapes:
            note = f"A page is {size} x {size} pixels, {tokens} tokens."
            return note, ["No lines of text were found on the images: look whether it is too faint, or too small."]
        placed = [processor.image_processor.placement(*shape)[2] / shape[0] for shape in shapes]
        seen = small_letters([height * scale for height, scale in zip(heights, placed, strict=True)])
        height, width = (round(statistics.median(side)) for side in zip(*shapes, strict=True))
        note = (
            f"A page is {size} x {size} pixels, {tokens} tokens; images have about {width} x {height} pixels, and on "
            f"nine of ten pages a line of text is at least {seen:.0f} pixels high as the encoder sees it."
        )
        warnings = []
        if seen < SMALLEST_HEIGHT:
            warnings.append(
                f"Lines of {seen:.0f} pixels are too small to be read: give a larger --page_size than {size}."
            )
        per_token = 1 if self.model_arguments.language_model else BYTES_A_TOKEN
        crowded = sum(n / per_token > MOST_TEXT_TOKENS * tokens for look in looks.values() for n in look.num_tokens)
        if crowded:
            warnings.append(
                f"{crowded} pages have more than {MOST_TEXT_TOKENS} tokens of text for each of the page's {tokens}, "
                f"beyond which DeepSeek-OCR reads worse: give a larger --page_size than {size}."
            )
        return note, warnings


def tokens_of(processor: LlavaProcessor) -> int:
    """Tokens of a page."""
    size = processor.image_processor.size
    return processor.image_processor.num_image_tokens(size["height"], size["width"])


def measured(tables: dict[str, Table], looks: dict[str, Inspection]) -> tuple[list[tuple[int, int]], list[float]]:
    """Shapes of the pages that were measured, and how high their letters are."""
    shapes, heights = [], []
    for name, look in looks.items():
        for row, height in look.line_heights.items():
            text = tables[name].texts[row]
            shapes.append(look.shapes[row])
            heights.append(letter_height(look.shapes[row], len(text) if isinstance(text, str) else 0, height))
    return shapes, heights


def unused(tables: dict[str, Table], used: dict[str, Table]) -> list[str]:
    """A sentence about each split that is neither trained on nor held out."""
    return [f"The split {name!r}, {len(tables[name]):,} pages, is not used." for name in tables if name not in used]
