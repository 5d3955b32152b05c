"""What pages are read from: image files, documents and datasets, found among the inputs of `encode_pages`.

Finding reads each file once, for its SHA-256, and decodes nothing. PDFium reads of a document what it needs for a
page, so that none is ever in memory as a whole.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps

from deepseek_ocr_vision.encoding.encoder import Page
from deepseek_ocr_vision.encoding.processes import Failure, map_in_processes
from deepseek_ocr_vision.encoding.table import Problem
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import open_image


if TYPE_CHECKING:
    import datasets
    import pypdfium2


IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".webp"}
"""What is taken for an image in a folder. A file that is named itself may have any suffix."""
PDF_SUFFIX = ".pdf"
POINTS_PER_INCH = 72
_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
_BYTES_HASHED_A_SECOND = 10_000_000  # at the least, from a slow disk
Content = str | bytes
"""A file's path, as the system has it, or what is in the file."""
StoredImage = dict[str, Any] | str | None
"""An image in a dataset: `bytes` and `path`, one of which may be `None`, or a path alone."""


class Source(Protocol):
    """Something with pages."""

    def pages(self) -> list[Page]:
        """Its pages."""

    def read(self, page: Page) -> Any:
        """One of them as the image processor takes it."""


# Files


@dataclass(frozen=True)
class File:
    """An image file, whose first frame is its page, or a PDF.

    Attributes:
        content: Its path, or its bytes.
        name: What its pages are stored under.
        digest: SHA-256 of what is in it.
        num_pages: How many there are, or `None` if it is no document.
        dpi: Pixels an inch that pages are rendered with.
    """

    content: Content
    name: str
    digest: str
    num_pages: int | None
    dpi: float

    def pages(self) -> list[Page]:
        if self.num_pages is None:
            return [Page(self.digest, self.name, 0)]
        return [Page(f"{self.digest}:{number}", self.name, number) for number in range(self.num_pages)]

    def read(self, page: Page) -> Image.Image:
        if self.num_pages is None:
            return image_of(self.content, self.digest)
        return _rendered(_opened_pdf(self.content, self.digest), page.number, self.dpi)


def find_file(content: Content, name: str, dpi: float) -> File:
    """An image or a document, with the number of its pages."""
    digest, start = digest_of(content)
    is_document = b"%PDF-" in start or name.lower().endswith(PDF_SUFFIX)
    return File(content, name, digest, _count_pages(content) if is_document else None, dpi)


def digest_of(content: Content) -> tuple[str, bytes]:
    """SHA-256 of a file, and how it begins."""
    with _opened(content) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return digest, file.read(1024)


def _opened(content: Content) -> IO[bytes]:
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")


def _require_same(content: Content, digest: str) -> None:
    if digest_of(content)[0] != digest:
        raise ValueError("the file changed while it was being encoded.")


def image_of(content: Content, digest: str) -> Image.Image:
    """An image, opened, once its file is found to be the one with that SHA-256."""
    if isinstance(content, str):
        content = Path(content).read_bytes()
    _require_same(content, digest)
    return open_image(io.BytesIO(content), "the file")


# PDFs


def require_pypdfium2() -> Any:
    """Say what to install where pypdfium2 is not."""
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("Reading PDFs needs pypdfium2: pip install 'deepseek-ocr-vision[encode]'") from error
    return pypdfium2


def _count_pages(content: Content) -> int:
    pypdfium2 = require_pypdfium2()
    try:
        with pypdfium2.PdfDocument(content) as document:
            num_pages = len(document)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"the PDF cannot be opened; it is encrypted or broken: {error}") from error
    if num_pages == 0:
        raise ValueError("the PDF has no pages.")
    return num_pages


@lru_cache(maxsize=1)
def _opened_pdf(content: Content, digest: str) -> "pypdfium2.PdfDocument":
    _require_same(content, digest)
    return require_pypdfium2().PdfDocument(content)


def close_documents() -> None:
    """Close the document that this process read last."""
    _opened_pdf.cache_clear()


def _rendered(document: "pypdfium2.PdfDocument", number: int, dpi: float) -> Image.Image:
    page = document[number]
    try:
        scale = dpi / POINTS_PER_INCH
        width, height = (math.ceil(side * scale) for side in page.get_size())
        limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        if width * height > limit:
            raise ValueError(f"at {dpi:g} dpi the page has {width} x {height} pixels, over {limit}.")
        return page.render(scale=scale).to_pil()
    finally:
        page.close()


# Datasets


@dataclass(frozen=True)
class Column:
    """A column of images, or of lists of them; each row is a page.

    Attributes:
        name: What its pages are stored under.
        column: Its name in the dataset.
        rows: The column alone, not decoded.
        is_list: Whether a row has a list of images.
        mode: Mode that `datasets` converts its images to, such as `"RGB"`, or `None`.
    """

    name: str
    column: str
    rows: "datasets.Dataset"
    is_list: bool
    mode: str | None

    @classmethod
    def of(cls, dataset: "datasets.Dataset", name: str, column: str) -> "Column":
        """That of a dataset.

        Raises:
            TypeError: It holds something else.
            ValueError: There is no such column.
        """
        import datasets

        if column not in dataset.column_names:
            raise ValueError(f"`image_column` is {column!r}; {name} has {dataset.column_names}.")
        feature = dataset.features[column]
        is_list = isinstance(feature, datasets.List | datasets.LargeList)
        image = feature.feature if is_list else feature
        if not isinstance(image, datasets.Image) and image != datasets.Value("string"):
            raise TypeError(
                f"Column {column!r} is {feature}; it has to hold images or paths, or lists of them. "
                f"`dataset.cast_column({column!r}, datasets.Image())` makes images of what can be read as such."
            )
        # As Arrow has them, images are not decoded.
        rows = dataset.select_columns(column).with_format("arrow")
        return cls(name, column, rows, is_list, getattr(image, "mode", None))

    def __len__(self) -> int:
        return len(self.rows)

    def cells(self) -> Iterator[list[StoredImage]]:
        """The images of each row."""
        for start in range(0, len(self.rows), 16):
            for cell in self.rows[start : start + 16][self.column].to_pylist():
                yield _as_list(cell)

    def read(self, page: Page) -> Image.Image:
        (cell,) = self.rows[page.number : page.number + 1][self.column].to_pylist()
        image = image_of(content_of(_as_list(cell)[page.index]), page.id)
        return image if self.mode is None else ImageOps.exif_transpose(image).convert(self.mode)


def _as_list(cell: Any) -> list[StoredImage]:
    return cell if isinstance(cell, list) else [] if cell is None else [cell]


def content_of(image: StoredImage) -> Content:
    """The file of an image as `datasets` stores it."""
    if image is None:
        raise ValueError("the image is None; leave it out of the list.")
    if isinstance(image, str):
        return image
    return image["path"] if image["bytes"] is None else image["bytes"]


# Finding


def find_pages(
    inputs: Sequence[str | os.PathLike],
    *,
    dpi: float,
    split: str,
    image_column: str,
    num_workers: int,
    timeout: float | None,
) -> tuple[dict[str, Source], list[Page], list[Problem]]:
    """The sources that inputs name, their pages, sorted by source and number, and what cannot be opened.

    Raises:
        FileNotFoundError: There is no such file, folder or dataset.
        ImportError: There is a PDF among them, and pypdfium2 is not installed.
        TypeError: A column of a dataset holds something else than images.
        ValueError: A dataset has no such split or column.
    """
    sources: dict[str, Source] = {}
    pages: list[Page] = []
    problems: list[Problem] = []
    paths: list[str] = []
    for given in map(os.fspath, inputs):
        if _is_dataset(given):
            column = Column.of(_loaded_dataset(given, split), given, image_column)
            sources[given] = column
            _find_rows(column, pages, problems)
        else:
            paths += _files(given)
    if any(path.lower().endswith(PDF_SUFFIX) for path in paths):
        require_pypdfium2()
    found = map_in_processes(
        _Finder(dpi), dict.fromkeys(paths), num_workers=num_workers, ahead=100, timeout=_time_to_find(timeout)
    )
    for path, file in found:
        if isinstance(file, Failure):
            problems.append(Problem(path, None, file.error))
        else:
            sources[file.name] = file
            pages += file.pages()
    return sources, sorted(pages, key=lambda page: page[1:]), sorted(problems, key=lambda each: each.source)


@dataclass(frozen=True)
class _Finder:
    dpi: float

    def __call__(self, path: str) -> File:
        return find_file(path, path, self.dpi)


def _time_to_find(timeout: float | None) -> Callable[[str], float | None]:
    """The limit for a file's pages to be counted, and the time to read it beside."""
    return lambda path: None if timeout is None else timeout + os.path.getsize(path) / _BYTES_HASHED_A_SECOND


def _find_rows(column: Column, pages: list[Page], problems: list[Problem]) -> None:
    for row, images in enumerate(column.cells()):
        if len(images) != 1:
            error = f"the row has {len(images)} images." if images else "the row has no image."
            problems.append(Problem(column.name, row, error))
            continue
        try:
            pages.append(Page(digest_of(content_of(images[0]))[0], column.name, row))
        except (OSError, ValueError) as error:
            problems.append(Problem(column.name, row, f"{type(error).__name__}: {error}"))


def _is_dataset(given: str) -> bool:
    path = Path(given)
    if path.is_dir():
        return any((path / name).is_file() for name in _DATASET_FILES)
    # What could be a file's name is a file that is missing, not a dataset to ask the Hub for.
    looks_like_a_file = path.suffix.lower() in IMAGE_SUFFIXES | {PDF_SUFFIX} or path.is_absolute()
    return (
        not path.exists() and not looks_like_a_file and 1 <= len(path.parts) <= 2 and path.parts[0] not in ("~", "..")
    )


def _files(path: str) -> Iterator[str]:
    """A file, or the images and PDFs in a folder and in those inside it; hidden ones are passed over."""
    if os.path.isfile(path):
        yield path
        return
    if not os.path.isdir(path):
        raise FileNotFoundError(f"There is no file, folder or dataset {path!r}.")
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES | {PDF_SUFFIX}:
                yield os.path.join(folder, name)


def _raise(error: OSError) -> None:
    raise error


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
