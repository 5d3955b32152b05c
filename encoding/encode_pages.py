"""Pages of any number through an encoder: `encode_pages`, and `EncodePages` for those who own the loop.

What is in the table is not computed again, so a start after an interruption takes what is left, whatever was started
before: one process, several that share the pages, or Ray.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import (
    list_some,
    require_choice,
    require_integer,
    require_number,
)
from deepseek_ocr_vision.encoding.encoder import Encoder, Page, printable
from deepseek_ocr_vision.encoding.on_ray import encode_on_ray
from deepseek_ocr_vision.encoding.processes import Failure, attempt, map_in_processes
from deepseek_ocr_vision.encoding.sources import DPI, Prepare, close_documents, find_pages, find_pages_in
from deepseek_ocr_vision.encoding.table import ERRORS, STORED_TYPES, Problem, TokenTable, require_pyarrow


if TYPE_CHECKING:
    import pyarrow


_PART_BYTES = 1 << 28
_SECONDS_BETWEEN_REPORTS = 5


@dataclass
class Summary:
    """What a call of `encode_pages` did.

    Attributes:
        num_pages: Pages of the inputs that are stored now.
        num_new: How many of them this call computed.
        problems: What could not be encoded.
        left_out: What was found in folders and is no image or document, and images of which the first frame alone was
            encoded; names by kind.
        seconds: How long it took.
        busy: Share of that time in [0, 1] in which an encoder computed. The rest is waiting for pages to be read and
            prepared, and writing.
        errors: Name of the file of problems.
    """

    num_pages: int
    num_new: int = 0
    problems: list[Problem] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    busy: float = 0.0
    errors: str = ERRORS

    @property
    def pages_per_second(self) -> float:
        """New pages a second."""
        return self.num_new / self.seconds if self.num_new else 0.0

    def progress(self, total: int, *, is_done: bool) -> dict[str, Any]:
        """What `on_progress` is called with."""
        counts = {"pages": self.num_pages, "total": total, "errors": len(self.problems)}
        return counts | {"pages_per_second": self.pages_per_second, "encoder_share": self.busy, "done": is_done}

    def __str__(self) -> str:
        parts = [f"{self.num_pages:,} page{'s' * (self.num_pages != 1)} stored, {self.num_new:,} of them new"]
        if self.num_new:
            parts.append(f"{self.pages_per_second:.1f} a second, the encoder at work {self.busy:.0%} of the time")
        if self.problems:
            parts.append(f"{len(self.problems):,} could not be encoded, see {self.errors}")
        for kind, names in self.left_out.items():
            parts.append(f"left out {len(names):,} ({kind}): {list_some(names, most=3)}")
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
    dpi: float = DPI,
    split: str = "train",
    image_column: str = "image",
    shard: tuple[int, int] = (0, 1),
    ray: str | None = None,
    num_encoders: int = 1,
    gpus_per_encoder: float = 0,
    show_progress: bool = True,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Summary:
    """Encode images, PDFs and datasets into a table of tokens.

    What is stored already is not computed again: an interrupted call goes on after the last part that was finished,
    and more inputs may be added later. Pages go by their content, so that a page under another name is the same one
    and is stored once. A page that cannot be read is left out, and named in `errors.jsonl`; the next call tries it
    again.

    Args:
        inputs: Image files, PDFs, folders of them (all that is in them), folders that `Dataset.save_to_disk` wrote,
            and names of datasets on the Hub. Each frame of a TIFF is a page, of an animation the first.
        model: The encoder, on its device.
        image_processor: Its image processor, in any preset and mode.
        out: Folder or URL to write, a new one or one with tokens of the same settings.
        tokens: How tokens are stored: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"` (scaled for each token), or
            `"none"`, for their mean alone. Defaults to the model's dtype, which is exact.
        batch_size: Pages that pass through the model at once, as far as they are of one size.
        num_workers: Processes that read and prepare pages while the model computes. With 0, it waits for them.
        timeout: Seconds in which a worker has to prepare a page; then it is left out. To find the pages of a file it
            has ten times as long.
        pages_per_file: Pages of a part, which is the most that is lost, beside those that are being prepared, when the
            process is killed.
        dpi: Pixels an inch that the pages of PDFs are rendered with.
        split: Of a dataset.
        image_column: Of a dataset: images, or paths of images.
        shard: Which share of the pages to encode, counted from 0, and of how many. Shares have about as many pages
            each, and none in common; the problems are in a file for each.
        ray: Address of a Ray cluster, or `"local"`: actors of Ray read and encode, and this process writes.
        num_encoders: Encoders on Ray.
        gpus_per_encoder: GPUs of each of them, or a fraction of one.
        show_progress: Whether to draw a bar.
        on_progress: Called every few seconds and at the end with `pages`, `total`, `errors`, `pages_per_second`,
            `encoder_share` and `done`.

    Raises:
        ImportError: pyarrow or Ray is not installed, or there is a PDF and pypdfium2 is not, or a dataset and
            `datasets` is not.
        OSError: An input does not exist, or the disk is full: then what is finished stays, and the next call goes on.
        TypeError: An argument is of another type, or a column holds something else.
        ValueError: An argument has a value that is not allowed; there is no page in the inputs; `out` holds something
            else, or tokens of other settings, which are named.
    """
    if isinstance(inputs, str | os.PathLike) or not inputs:
        raise ValueError(f"`inputs` is {inputs!r}; it has to be a list of files, folders or datasets, at least one.")
    tokens = stored_type(tokens, model)
    require_number("dpi", dpi, at_least=1, at_most=2400)
    require_integer("num_workers", num_workers, at_least=0 if timeout is None and ray is None else 1)
    require_number("timeout", 1 if timeout is None else timeout, above=0)
    require_integer("batch_size", batch_size, at_least=1)
    require_integer("pages_per_file", pages_per_file, at_least=1)
    require_integer("num_encoders", num_encoders, at_least=1)
    require_number("gpus_per_encoder", gpus_per_encoder, at_least=0)
    number, num_shards = shard
    require_integer("shard[1]", num_shards, at_least=1)
    require_integer("shard[0]", number, at_least=0, at_most=num_shards - 1)

    work: dict[str, Any] = {"num_workers": num_workers, "timeout": timeout}
    found = find_pages(inputs, split=split, image_column=image_column, **work)
    if not found.pages and not found.problems:
        raise ValueError(f"There are no images, PDFs or pages in {[os.fspath(each) for each in inputs]}.")
    pages = [page for page in found.pages if _place(page.id) % num_shards == number]
    encoder = Encoder(model, image_processor, tokens, batch_size)
    errors = ERRORS if num_shards == 1 else f"errors-{number}-of-{num_shards}.jsonl"
    table = TokenTable(out, encoder.settings(dpi=dpi), errors=errors)
    missing: dict[str, list[Page]] = {}
    for page in pages:
        if page.id not in table:
            missing.setdefault(page.id, []).append(page)
    encode: Callable[..., Generator[pyarrow.Table, None, None]] = encode_locally
    if ray is not None:
        encode = partial(encode_on_ray, address=ray, num_encoders=num_encoders, gpus_per_encoder=gpus_per_encoder)
    prepare = Prepare(found.columns, image_processor, model.dtype, dpi)
    rows = write_parts(table, encode(encoder, prepare, [same[0] for same in missing.values()], **work), pages_per_file)
    problems = found.problems if number == 0 else []
    num_stored = sum(page.id in table for page in pages)
    summary = Summary(num_stored, 0, problems, dict(found.left_out), errors=errors)
    with tqdm(total=len(pages), initial=summary.num_pages, unit="page", disable=not show_progress) as bar:
        _follow(rows, table, missing, summary, bar, 1 if ray is None else num_encoders, on_progress)
    summary.num_pages = sum(page.id in table for page in pages)
    if on_progress is not None:
        on_progress(summary.progress(len(pages), is_done=True))
    return summary


def _place(id: str) -> int:
    """A number of a page by which shares are made: the same for the same page, one more for a document's next."""
    digest, _, number = id.partition(":")
    return int(digest[:12], 16) + int(number or 0)


def stored_type(tokens: str | None, model: PreTrainedModel) -> str:
    """How tokens are stored: as asked, or else as the model computes them."""
    return require_choice("tokens", tokens or str(model.dtype).removeprefix("torch."), STORED_TYPES)


def _follow(
    batches: "Iterator[pyarrow.Table]",
    table: TokenTable,
    missing: dict[str, list[Page]],
    summary: Summary,
    bar: tqdm,
    num_encoders: int,
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Take notice of rows as they are computed: in the summary, the bar, the file of problems, and `on_progress`."""
    started, reported, computed = time.perf_counter(), 0.0, 0.0
    table.write_problems(summary.problems)
    try:
        for batch in batches:
            rows = batch.select(["id", "seconds", "error"]).to_pylist()
            failed = [row for row in rows if row["error"] is not None]
            same = [(page, row["error"]) for row in failed for page in missing[row["id"]]]
            problems = [Problem(printable(page.source), page.number, error) for page, error in same]
            num_pages = sum(len(missing[row["id"]]) for row in rows)
            computed += sum(row["seconds"] or 0 for row in rows)
            summary.problems += problems
            summary.num_new += len(rows) - len(failed)
            summary.num_pages += num_pages - len(problems)
            summary.seconds = time.perf_counter() - started
            summary.busy = min(1.0, computed / summary.seconds / num_encoders)
            bar.update(num_pages)
            if problems and table.is_local:
                table.add_problems(problems)
            if summary.seconds - reported > _SECONDS_BETWEEN_REPORTS:
                reported = summary.seconds
                if not table.is_local:
                    table.write_problems(summary.problems)
                if on_progress is not None:
                    on_progress(summary.progress(bar.total, is_done=False))
    finally:
        close_documents()
        table.write_problems(summary.problems)
    summary.seconds = time.perf_counter() - started


def encode_locally(
    encoder: Encoder, prepare: Prepare, pages: Iterable[Page], *, num_workers: int, timeout: float | None
) -> "Generator[pyarrow.Table, None, None]":
    """Rows of pages, batch by batch, once they are computed; workers prepare while this process encodes."""
    ahead = 2 * encoder.batch_size
    prepared = map_in_processes(prepare, pages, num_workers=num_workers, ahead=ahead, timeout=timeout)
    with closing(prepared):
        yield from encoder.encode(prepared)


def write_parts(
    table: TokenTable, batches: "Generator[pyarrow.Table, None, None]", pages_per_file: int
) -> "Iterator[pyarrow.Table]":
    """Write batches of rows, part by part, and hand each on once it is computed."""
    pa = require_pyarrow()
    part: list[pyarrow.Table] = []
    with closing(batches), ThreadPoolExecutor(1) as thread:
        written: Future = thread.submit(bool)  # the part before
        for rows in batches:
            part.append(rows)
            yield rows
            if sum(map(len, part)) >= pages_per_file or sum(each.nbytes for each in part) >= _PART_BYTES:
                written.result()
                written, part = thread.submit(table.write, pa.concat_tables(part)), []
        written.result()
        if part:
            table.write(pa.concat_tables(part))


# A loop of somebody else


class EncodePages:
    """Batches of files to rows of tokens, for `map_batches` of Ray, `map` of datasets or `mapInArrow` of Spark.

    A row is a page: the columns that `encode_pages` stores, and `error`, which says why a file has no tokens.

    Args:
        model: The encoder on its device, or what `weights.load_encoder` takes: a folder or a Hub id.
        image_processor: Its image processor, if `model` is an encoder.
        column: Column of the batch with paths, or with the bytes of files.
        tokens: How tokens are stored, as for `encode_pages`.
        batch_size: Pages that pass through the model at once, as far as they are of one size.
        dpi: Pixels an inch that the pages of PDFs are rendered with.
        device: Where the encoder computes, if it is to be moved.

    Raises:
        ValueError: `tokens` is not known.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike,
        image_processor: Any = None,
        *,
        column: str = "path",
        tokens: str | None = None,
        batch_size: int = 1,
        dpi: float = DPI,
        device: str | None = None,
    ):
        if isinstance(model, str | os.PathLike):
            from deepseek_ocr_vision.weights import load_encoder

            model, image_processor = load_encoder(model)
        if device is not None:
            model.to(device)  # type: ignore[arg-type]  # transformers wraps it as a plain function
        self.encoder = Encoder(model, image_processor, stored_type(tokens, model), batch_size)
        self.column = column
        self.dpi = dpi

    def __call__(self, batch: Any) -> "pyarrow.Table":
        """The rows of a batch.

        Args:
            batch: Columns by name: a dictionary, a data frame or an Arrow table.
        """
        contents = batch[self.column]
        contents = contents.to_pylist() if hasattr(contents, "to_pylist") else list(contents)
        return require_pyarrow().concat_tables(
            [self.encoder.failed([]), *self.encoder.encode(self._prepared(contents))]
        )

    def _prepared(self, contents: list[str | bytes]) -> Iterator[tuple[Page, Any]]:
        for number, content in enumerate(contents):
            name = content if isinstance(content, str) else f"{self.column} {number} of the batch"
            found = attempt(partial(find_pages_in, source=name), content)
            if isinstance(found, Failure):
                yield Page("", name, 0), found
                continue
            contents_by_name = {name: content} if isinstance(content, bytes) else {}
            prepare = Prepare(contents_by_name, self.encoder.image_processor, self.encoder.model.dtype, self.dpi)
            yield from ((page, attempt(prepare, page)) for page in found[0])
