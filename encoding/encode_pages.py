"""Pages of any number through an encoder: `encode_pages`.

Workers read and prepare pages, the encoder computes, and files of tokens come out, each whole. Pages are cut into
pieces; a process takes the next piece that nobody computes, so that one launch or many share the work, and a start
after an interruption takes what is left.

Letters in the shapes: H, W pixels.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from deepseek_ocr_vision.encoding.batches import Inputs, are_alike, encode_batch
from deepseek_ocr_vision.encoding.page_store import Page, PageStore, require_datasets
from deepseek_ocr_vision.encoding.sources import Problem, Source, close_documents, find_sources
from deepseek_ocr_vision.encoding.token_store import STORED_TYPES, encoder_fingerprint, image_processor_settings


@dataclass(frozen=True)
class Summary:
    """What a call of `encode_pages` did.

    Attributes:
        num_pages: Pages of the inputs that are stored now.
        num_new: How many of them this process computed.
        problems: What could not be encoded, as in `errors.jsonl`.
        seconds: How long this process computed.
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
    batch_size: int = 1,
    num_workers: int = 0,
    pages_per_file: int = 128,
    dpi: float = 144,
    split: str = "train",
    image_column: str = "image",
    show_progress: bool = True,
) -> Summary:
    """Encode pictures, PDFs and datasets into a folder that `datasets` reads.

    What is stored already is not computed again: an interrupted call goes on after the last file that was finished,
    and more inputs may be added later. Several processes with one `out`, those of one launch or others, share the
    work, and each returns when the last page is done. A page that cannot be read is left out, and named in
    `errors.jsonl`; the next call tries it again.

    Args:
        inputs: Picture files, PDFs, folders of them (all that is in them, hidden files aside), folders that
            `Dataset.save_to_disk` wrote, and names of datasets on the Hub. Pages go by these names, so name them the
            same way when you go on.
        model: The encoder, on its device; tokens are stored in its dtype, bit for bit.
        image_processor: Its image processor, in any preset and mode.
        out: Folder to write, a new one or one with tokens of the same settings. A page of 256 tokens, 1024 wide, takes
            0.5 MB in 16 bits.
        batch_size: Pages that pass through the model at once, as far as they are of one size.
        num_workers: Processes that read and prepare pages while the model computes. With 0, it waits for them.
        pages_per_file: Pages of a piece of work, which a process loses at the most, beside those it has begun to
            prepare, when it is killed.
        dpi: Pixels an inch that the pages of PDFs are drawn with. DeepSeek's own code for PDFs has 144.
        split: Of a dataset.
        image_column: Of a dataset: pictures, or paths of pictures.
        show_progress: Whether to draw a bar.

    Raises:
        ImportError: `datasets` is not installed, or there is a PDF and pypdfium2 is not.
        OSError: An input does not exist, or the disk is full: then what is finished stays, and the next call goes on.
        TypeError: A column holds something else.
        ValueError: An argument has a value that is not allowed; there is no page in the inputs; `out` holds something
            else, or tokens of other settings, which are named.
    """
    require_datasets()
    _check(inputs, model, dpi, num_workers=num_workers, batch_size=batch_size, pages_per_file=pages_per_file)
    sources, problems = find_sources(inputs, dpi=dpi, split=split, image_column=image_column)
    if not sources and not problems:
        raise ValueError(f"There are no pictures, PDFs or pages in {[os.fspath(each) for each in inputs]}.")
    settings = _settings(model, image_processor, dpi)
    store = PageStore(out, settings, dtype=model.dtype, width=model.config.hidden_size)
    problems += store.refuse_changed(sources)
    sources = {name: source for name, source in sources.items() if name not in {each.source for each in problems}}
    work = Work(store, sources, model, image_processor, batch_size, num_workers, show_progress)
    work.run(pages_per_file)
    problems = sorted([*problems, *work.problems()], key=lambda each: (each.source, each.page or 0))
    store.finish(problems)
    num_pages = sum(page in store for page in work.pages)
    return Summary(num_pages, work.num_new, problems, work.seconds, work.computed / max(work.seconds, 1e-9))


def _check(inputs: Any, model: Any, dpi: Any, *, num_workers: Any, **positive: Any) -> None:
    if isinstance(inputs, str | os.PathLike) or not inputs:
        raise ValueError(f"`inputs` is {inputs!r}; it has to be a list of files, folders or datasets, at least one.")
    if model.dtype not in STORED_TYPES:
        raise ValueError(f"`model` computes in {model.dtype}; it has to be one of {list(STORED_TYPES)}.")
    if not isinstance(dpi, int | float) or not 1 <= dpi <= 2400:
        raise ValueError(f"`dpi` is {dpi!r}; it has to be a number from 1 to 2400.")
    for name, value in {"num_workers": num_workers, **positive}.items():
        lowest = 0 if name == "num_workers" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise ValueError(f"`{name}` is {value!r}; it has to be an integer, at least {lowest}.")


def _settings(model: PreTrainedModel, image_processor: Any, dpi: float) -> dict[str, Any]:
    return {
        "encoder": encoder_fingerprint(model),
        "feature_mode": model.config.feature_mode,
        "image_processor": image_processor_settings(image_processor),
        "mode": getattr(image_processor, "mode", None),
        "dpi": dpi,
    }


# Preparing


Prepared = Inputs | str
"""What the model reads of a page, or why there is no such thing."""


class PreparedPages(Dataset):
    """Pages as the model reads them, by `Page`; what the workers of a `DataLoader` do."""

    def __init__(self, sources: Mapping[str, Source], image_processor: Any, dtype: torch.dtype):
        self.sources = sources
        self.image_processor = image_processor
        self.dtype = dtype

    def __getitem__(self, page: Page) -> Prepared:
        try:
            picture = self.sources[page.source].read(page.number)
            inputs = self.image_processor(picture, return_tensors="pt")
        except MemoryError:
            raise
        except Exception as error:
            # Decoders raise whatever the broken bytes lead them to: SyntaxError, struct.error, PdfiumError, ...
            return f"{type(error).__name__}: {error}"
        # The model casts pixels to its dtype anyway; here it halves what goes from process to process.
        return {name: value.to(self.dtype) if torch.is_tensor(value) else value for name, value in inputs.items()}


def _as_it_is(prepared: Prepared) -> Prepared:
    return prepared


# Work


@dataclass
class Piece:
    """Pages whose tokens go into one file, as far as they are missing, and the lock that says who computes them."""

    pages: list[Page]
    missing: list[Page]
    lock: FileLock


@dataclass
class Work:
    """Fills a store with the tokens of pages, beside other processes that do the same."""

    store: PageStore
    sources: Mapping[str, Source]
    model: PreTrainedModel
    image_processor: Any
    batch_size: int
    num_workers: int
    show_progress: bool
    num_new: int = 0
    seconds: float = 0.0
    computed: float = 0.0
    started: float = field(default_factory=time.time)

    def __post_init__(self):
        self.pages = [
            Page(name, number) for name, source in self.sources.items() for number in range(source.num_pages)
        ]
        self.claimed: deque[Piece] = deque()

    def run(self, pages_per_file: int) -> None:
        """Compute what is not stored, in pieces that do not depend on what is, so that processes agree on them."""
        pieces = [self.pages[start : start + pages_per_file] for start in range(0, len(self.pages), pages_per_file)]
        pieces = [piece for piece in pieces if any(page not in self.store for page in piece)]
        total, stored = len(self.pages), self._num_stored()
        with tqdm(total=total, initial=stored, unit="page", desc="Encoding", disable=not self.show_progress) as bar:
            while pieces:
                started = time.perf_counter()
                pieces = self._take_what_is_free(pieces, bar)
                self.seconds += time.perf_counter() - started
                if pieces:
                    # Waiting with nothing claimed, so that no two processes wait for each other.
                    with self.store.lock(pieces[0]):
                        self.store.refresh()
                        bar.update(self._num_stored() - bar.n)

    def problems(self) -> list[Problem]:
        """Why pages are not stored."""
        return [self.store.problem_of(page) for page in self.pages if page not in self.store]

    def _num_stored(self) -> int:
        return sum(page in self.store for page in self.pages)

    def _take_what_is_free(self, pieces: list[list[Page]], bar: tqdm) -> list[list[Page]]:
        """Compute the pieces that nobody else does, and give the others."""
        in_other_hands: list[list[Page]] = []
        stream = iter(self._loader(self._claim(pieces, in_other_hands)))
        try:
            for first in stream:
                piece = self.claimed[0]
                self._write(piece, chain([first], islice(stream, len(piece.missing) - 1)), bar)
                self.claimed.popleft().lock.release()
        finally:
            while self.claimed:
                self.claimed.popleft().lock.release()
            close_documents()
        self.store.refresh()
        return in_other_hands

    def _loader(self, pages: Iterator[Page]) -> DataLoader:
        """Pages, prepared some way ahead: while a batch is computed, the next one becomes ready."""
        prepared = PreparedPages(self.sources, self.image_processor, self.model.dtype)
        ahead = max(2, math.ceil(2 * self.batch_size / self.num_workers)) if self.num_workers else None
        return DataLoader(
            prepared,
            batch_size=None,
            sampler=pages,
            num_workers=self.num_workers,
            prefetch_factor=ahead,
            collate_fn=_as_it_is,
        )

    def _claim(self, pieces: list[list[Page]], in_other_hands: list[list[Page]]) -> Iterator[Page]:
        """The pages to compute. Workers prepare some ahead, so a piece is claimed a little before its turn."""
        for pages in pieces:
            if all(page in self.store for page in pages):
                continue
            lock = self.store.lock(pages)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                in_other_hands.append(pages)
                continue
            self.store.refresh()
            missing = [page for page in pages if page not in self.store]
            missing = [page for page in missing if not self.store.was_noted_since(page, self.started)]
            if not missing:
                lock.release()
                continue
            self.claimed.append(Piece(pages, missing, lock))
            yield from missing

    def _write(self, piece: Piece, stream: Iterator[Prepared], bar: tqdm) -> None:
        batches = self._batches(zip(piece.missing, stream, strict=True))
        self.store.write(piece.pages, self._computed(batches, bar))

    def _batches(self, prepared: Iterator[tuple[Page, Prepared]]) -> Iterator[list[tuple[Page, Inputs]]]:
        batch: list[tuple[Page, Inputs]] = []
        for page, inputs in prepared:
            if isinstance(inputs, str):
                self.store.note(Problem(*page, inputs))
                continue
            if batch and not are_alike(batch[0][1], inputs):
                yield batch
                batch = []
            batch.append((page, inputs))
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _computed(self, batches: Iterator[list[tuple[Page, Inputs]]], bar: tqdm) -> Iterator[dict[str, list]]:
        """Rows as columns, batch by batch."""
        for batch in batches:
            started = time.perf_counter()
            tokens = encode_batch(self.model, [inputs for _, inputs in batch], dtype=self.store.dtype)
            self.computed += time.perf_counter() - started
            rows = [self._row(*each, tokens=of) for each, of in zip(batch, tokens, strict=True)]
            rows = [row for row in rows if row is not None]
            if rows:
                yield {name: [row[name] for row in rows] for name in rows[0]}
            self.num_new += len(rows)
            bar.update(len(batch))

    def _row(self, page: Page, inputs: Inputs, *, tokens: torch.Tensor) -> dict[str, Any] | None:
        if not tokens.isfinite().all():
            self.store.note(Problem(*page, f"its tokens are not finite in {self.store.dtype}; another may hold them."))
            return None
        height, width = inputs["pixel_values"].shape[-2:]
        return {
            "source": page.source,
            "page": page.number,
            "version": self.sources[page.source].version,
            "grid": [height // self.model.config.patch_size, width // self.model.config.patch_size],
            "patches_grid": inputs["patches_grid"][0] if "patches_grid" in inputs else [1, 1],
            "tokens": tokens,
        }
