"""Pages of any number through an encoder: `encode_pages`.

Workers read and prepare pages, the encoder computes, and parts of a table come out, each whole. What is in the table
is not computed again, so a start after an interruption takes what is left.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import (
    require_choice,
    require_integer,
    require_number,
)
from deepseek_ocr_vision.encoding.encoder import Encoder, Inputs, Page
from deepseek_ocr_vision.encoding.processes import map_in_processes
from deepseek_ocr_vision.encoding.sources import Source, close_documents, find_pages
from deepseek_ocr_vision.encoding.table import STORED_TYPES, Problem, TokenTable


if TYPE_CHECKING:
    import pyarrow


_PART_BYTES = 1 << 28


@dataclass(frozen=True)
class Summary:
    """What a call of `encode_pages` did.

    Attributes:
        num_pages: Pages of the inputs that are stored now.
        num_new: How many of them this call computed.
        problems: What could not be encoded, as in `errors.jsonl`.
        seconds: How long it took.
        busy: Share of that time in [0, 1] in which the encoder computed. The rest is waiting for pages to be read and
            prepared, and writing.
    """

    num_pages: int
    num_new: int
    problems: list[Problem]
    seconds: float
    busy: float

    def __str__(self) -> str:
        rate = self.num_new / max(self.seconds, 1e-9)
        parts = [f"{self.num_pages:,} page{'s' * (self.num_pages != 1)} stored, {self.num_new:,} of them new"]
        if self.num_new:
            parts.append(f"{rate:.1f} a second, the encoder at work {self.busy:.0%} of the time")
        if self.problems:
            parts.append(f"{len(self.problems):,} could not be encoded, see errors.jsonl")
        return "; ".join(parts) + "."


def encode_pages(
    inputs: Sequence[str | os.PathLike],
    model: PreTrainedModel,
    image_processor: Any,
    *,
    out: str | os.PathLike,
    tokens: str | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    timeout: float | None = None,
    pages_per_file: int = 128,
    dpi: float = 144,
    split: str = "train",
    image_column: str = "image",
    show_progress: bool = True,
) -> Summary:
    """Encode images, PDFs and datasets into a table of tokens.

    What is stored already is not computed again: an interrupted call goes on after the last part that was finished,
    and more inputs may be added later. Pages go by their content, so that a page under another name is the same one
    and is stored once. A page that cannot be read is left out, and named in `errors.jsonl`; the next call tries it
    again.

    Args:
        inputs: Image files, PDFs, folders of them (all that is in them, hidden files aside), folders that
            `Dataset.save_to_disk` wrote, and names of datasets on the Hub.
        model: The encoder, on its device.
        image_processor: Its image processor, in any preset and mode.
        out: Folder or URL to write, a new one or one with tokens of the same settings.
        tokens: How tokens are stored: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"` (scaled for each token), or
            `"none"`, for their mean alone. Defaults to the model's dtype, which is exact. A page of 256 tokens, 1024
            wide, takes 1 MB in 32 bits.
        batch_size: Pages that pass through the model at once, as far as they are of one size.
        num_workers: Processes that read and prepare pages while the model computes. With 0, it waits for them.
        timeout: Seconds in which a worker has to prepare a page, or open a document; then it is left out.
        pages_per_file: Pages of a part, which is the most that is lost, beside those that are being prepared, when the
            process is killed.
        dpi: Pixels an inch that the pages of PDFs are rendered with. DeepSeek's own code for PDFs has 144.
        split: Of a dataset.
        image_column: Of a dataset: images, or paths of images.
        show_progress: Whether to draw a bar.

    Raises:
        ImportError: pyarrow is not installed, or there is a PDF and pypdfium2 is not, or a dataset and `datasets`.
        OSError: An input does not exist, or the disk is full: then what is finished stays, and the next call goes on.
        TypeError: An argument is of another type, or a column holds something else.
        ValueError: An argument has a value that is not allowed; there is no page in the inputs; `out` holds something
            else, or tokens of other settings, which are named.
    """
    _check_inputs(inputs)
    tokens = require_choice("tokens", tokens or str(model.dtype).removeprefix("torch."), STORED_TYPES)
    require_number("dpi", dpi, at_least=1, at_most=2400)
    require_integer("num_workers", num_workers, at_least=0 if timeout is None else 1)
    if timeout is not None:
        require_number("timeout", timeout, above=0)
    require_integer("batch_size", batch_size, at_least=1)
    require_integer("pages_per_file", pages_per_file, at_least=1)
    workers = {"num_workers": num_workers, "timeout": timeout}
    found = find_pages(inputs, dpi=dpi, split=split, image_column=image_column, **workers)
    sources, pages, problems = found
    if not pages and not problems:
        raise ValueError(f"There are no images, PDFs or pages in {[os.fspath(each) for each in inputs]}.")
    encoder = Encoder(model, image_processor, tokens, batch_size)
    table = TokenTable(out, encoder.settings(dpi=dpi))
    try:
        table.forget_problems()
        for problem in problems:
            table.note(problem)
        work = encode_missing(table, encoder, sources, pages, pages_per_file=pages_per_file, **workers)
        started, num_new, computed = time.perf_counter(), 0, 0.0
        stored = sum(page.id in table for page in pages)
        with tqdm(total=len(pages), initial=stored, unit="page", desc="Encoding", disable=not show_progress) as bar:
            for rows in work:
                for row in rows.select(["source", "page", "seconds", "error"]).to_pylist():
                    if row["error"] is None:
                        num_new, computed = num_new + 1, computed + row["seconds"]
                    else:
                        problems.append(Problem(row["source"], row["page"], row["error"]))
                        table.note(problems[-1])
                bar.update(len(rows))
        seconds = time.perf_counter() - started
    finally:
        table.close()
    num_pages = sum(page.id in table for page in pages)
    return Summary(num_pages, num_new, problems, seconds, computed / max(seconds, 1e-9))


def _check_inputs(inputs: Any) -> None:
    if isinstance(inputs, str | os.PathLike) or not inputs:
        raise ValueError(f"`inputs` is {inputs!r}; it has to be a list of files, folders or datasets, at least one.")


# The loop of one process


@dataclass(frozen=True)
class Prepare:
    """Reads pages and prepares them as the model takes them; what workers do."""

    sources: Mapping[str, Source]
    image_processor: Any
    dtype: torch.dtype

    def __call__(self, page: Page) -> Inputs:
        inputs = self.image_processor(self.sources[page.source].read(page), return_tensors="pt")
        # The model casts pixels to its dtype anyway; here it halves what goes from process to process.
        return {name: value.to(self.dtype) if torch.is_tensor(value) else value for name, value in inputs.items()}


def encode_missing(
    table: TokenTable,
    encoder: Encoder,
    sources: Mapping[str, Source],
    pages: Iterable[Page],
    *,
    num_workers: int,
    timeout: float | None,
    pages_per_file: int,
) -> "Iterator[pyarrow.Table]":
    """Encode the pages that a table lacks and write them, part by part.

    Yields:
        The rows, with their errors, batch by batch, once they are computed.
    """
    missing = {page.id: page for page in pages if page.id not in table}
    prepare = Prepare(sources, encoder.image_processor, encoder.model.dtype)
    workers = {"num_workers": num_workers, "ahead": 2 * encoder.batch_size, "timeout": lambda page: timeout}
    prepared = map_in_processes(prepare, missing.values(), **workers)
    with _Writer(table, pages_per_file) as writer:
        try:
            for rows in encoder.encode(prepared):
                writer.add(rows)
                yield rows
        finally:
            prepared.close()
            close_documents()


class _Writer:
    """Gathers rows for a part and writes it while the next one is computed."""

    def __init__(self, table: TokenTable, pages_per_file: int):
        self.table = table
        self.pages_per_file = pages_per_file
        self.rows: list[pyarrow.Table] = []
        self.thread = ThreadPoolExecutor(1)
        self.written: Future | None = None

    def add(self, rows: "pyarrow.Table") -> None:
        self.rows.append(rows)
        if sum(map(len, self.rows)) >= self.pages_per_file or sum(each.nbytes for each in self.rows) >= _PART_BYTES:
            self.write()

    def write(self) -> None:
        import pyarrow as pa

        if self.written is not None:
            self.written.result()
        if self.rows:
            self.written = self.thread.submit(self.table.write, pa.concat_tables(self.rows))
            self.rows = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self.write()
                self.write()
        finally:
            self.thread.shutdown()
