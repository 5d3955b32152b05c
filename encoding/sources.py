"""What pages are read from: picture files, PDFs and datasets, found among the inputs of `encode_pages`.

Finding reads no page: of a picture file its size and time of change, of a PDF its number of pages. PDFium reads of a
document what it needs for a page, so that none is ever in memory as a whole.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image


if TYPE_CHECKING:
    import datasets
    import pypdfium2


PICTURE_SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"}
PICTURE_SUFFIXES |= {".tif", ".tiff", ".webp"}
"""What is taken for a picture in a folder. A file that is named itself may have any suffix."""
PDF_SUFFIX = ".pdf"
POINTS_PER_INCH = 72
_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes


class Source(Protocol):
    """Something with pages.

    Attributes:
        name: What its pages go by.
        version: Something that is another when its content is.
        num_pages: How many there are.
    """

    name: str
    version: str
    num_pages: int

    def read(self, page: int) -> Any:
        """A page, counted from 0, as the image processor takes it."""


@dataclass(frozen=True)
class Problem:
    """Why a page, or all of a source, could not be encoded.

    Attributes:
        source: Its name.
        page: The page, counted from 0, or `None` for all.
        error: Why.
    """

    source: str
    page: int | None
    error: str


# Kinds


@dataclass(frozen=True)
class PictureFile:
    """A file with one page; of a picture with several frames it is the first."""

    name: str
    version: str
    num_pages: int = 1

    def read(self, page: int) -> str:
        return self.name


@dataclass(frozen=True)
class PdfFile:
    """A document, drawn page by page."""

    name: str
    version: str
    num_pages: int
    dpi: float

    def read(self, page: int) -> Image.Image:
        # A process of its own opens it again: two that share an open file share their place in it.
        drawn = _opened_pdf(self.name, self.version, os.getpid())[page]
        try:
            scale = self.dpi / POINTS_PER_INCH
            width, height = (math.ceil(side * scale) for side in drawn.get_size())
            limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
            if width * height > limit:
                raise ValueError(f"at {self.dpi:g} dpi the page has {width} x {height} pixels, over {limit}.")
            return drawn.render(scale=scale).to_pil()
        finally:
            drawn.close()


@lru_cache(maxsize=1)
def _opened_pdf(path: str, version: str, process: int) -> "pypdfium2.PdfDocument":
    import pypdfium2

    return pypdfium2.PdfDocument(path)


def close_documents() -> None:
    """Close the document that this process read last."""
    _opened_pdf.cache_clear()


@dataclass(frozen=True)
class DatasetRows:
    """A column of pictures; each row is a page."""

    name: str
    version: str
    num_pages: int
    column: str
    rows: "datasets.Dataset"

    def read(self, page: int) -> Any:
        cell = self.rows[page][self.column]
        if isinstance(cell, str):
            return cell
        if cell is None:
            raise ValueError("the row has no picture.")
        return cell["path"] if cell["bytes"] is None else Image.open(io.BytesIO(cell["bytes"]))


# Finding


def find_sources(
    inputs: Sequence[str | os.PathLike], *, dpi: float, split: str, image_column: str
) -> tuple[dict[str, Source], list[Problem]]:
    """The sources that inputs name, sorted by name, and those that cannot be opened.

    Args:
        inputs: Picture files, PDFs, folders of them, folders that `Dataset.save_to_disk` wrote, names on the Hub.
        dpi: Pixels an inch that PDFs are drawn with.
        split: Of a dataset.
        image_column: Of a dataset.

    Raises:
        FileNotFoundError: There is no such file, folder or dataset.
        ImportError: There is a PDF among them, and pypdfium2 is not installed.
        ValueError: A dataset has no such split or column.
    """
    sources: dict[str, Source] = {}
    problems: dict[str, Problem] = {}
    for given in inputs:
        if _is_dataset(given):
            rows = _dataset_rows(os.fspath(given), split, image_column)
            sources[rows.name] = rows
            continue
        for path in _files(Path(given)):
            try:
                sources[str(path)] = _file_source(path, dpi)
            except (OSError, ValueError) as error:
                problems[str(path)] = Problem(str(path), None, str(error))
    return dict(sorted(sources.items())), [problem for _, problem in sorted(problems.items())]


def _is_dataset(given: str | os.PathLike) -> bool:
    path = Path(given)
    if path.is_dir():
        return any((path / name).is_file() for name in _DATASET_FILES)
    # What could be a file's name is a file that is missing, not a dataset to ask the Hub for.
    looks_like_a_file = path.suffix.lower() in PICTURE_SUFFIXES | {PDF_SUFFIX} or path.is_absolute()
    return (
        not path.exists() and not looks_like_a_file and 1 <= len(path.parts) <= 2 and path.parts[0] not in ("~", "..")
    )


def _files(path: Path) -> Iterator[Path]:
    """A file, or the pictures and PDFs in a folder and in those inside it; hidden ones are passed over."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file, folder or dataset {str(path)!r}.")
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            found = Path(folder, name)
            if not name.startswith(".") and found.suffix.lower() in PICTURE_SUFFIXES | {PDF_SUFFIX}:
                yield found


def _raise(error: OSError) -> None:
    raise error


def _file_source(path: Path, dpi: float) -> Source:
    status = path.stat()
    version = f"{status.st_size}-{status.st_mtime_ns}"
    if path.suffix.lower() != PDF_SUFFIX:
        return PictureFile(str(path), version)
    return PdfFile(str(path), version, _count_pages(path), dpi)


def _count_pages(path: Path) -> int:
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("Reading PDFs needs pypdfium2: pip install 'deepseek-ocr-vision[encode]'") from error
    try:
        with pypdfium2.PdfDocument(path) as document:
            num_pages = len(document)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"the PDF cannot be opened; it is encrypted or broken: {error}") from error
    if num_pages == 0:
        raise ValueError("the PDF has no pages.")
    return num_pages


def _dataset_rows(name: str, split: str, column: str) -> DatasetRows:
    dataset = _loaded_dataset(name, split)
    if column not in dataset.column_names:
        raise ValueError(f"`image_column` is {column!r}; the dataset {name!r} has {dataset.column_names}.")
    return DatasetRows(name, dataset._fingerprint, len(dataset), column, _undecoded(dataset, column))


def _loaded_dataset(name: str, split: str) -> "datasets.Dataset":
    import datasets

    if not Path(name).is_dir():
        try:
            return datasets.load_dataset(name, split=split)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"There is no file, folder or dataset {name!r}: {error}") from error
    dataset = datasets.load_from_disk(name)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"`split` is {split!r}; the dataset {name!r} has {list(dataset)}.")
        dataset = dataset[split]
    return dataset


def _undecoded(dataset: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """The column of pictures alone, as files: what a process does not encode it need not decode."""
    import datasets

    feature = dataset.features[column]
    dataset = dataset.select_columns(column).with_format(None)
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if feature == datasets.Value("string"):
        return dataset
    raise TypeError(f"Column {column!r} is {feature}; it has to hold pictures or paths of pictures.")
