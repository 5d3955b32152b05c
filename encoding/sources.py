"""What pages are read from: image files, documents and datasets, found among the inputs of `encode_pages`.

Finding reads each file once, for its SHA-256, and decodes nothing. PDFium and Pillow read of a document what they need
for a page, so that none is ever in memory as a whole.
"""

import hashlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import torch
from PIL import Image

from deepseek_ocr_vision.configuration.extras import require
from deepseek_ocr_vision.encoding.encoder import Inputs, Page, printable
from deepseek_ocr_vision.encoding.processes import Failure, attempt, map_in_processes
from deepseek_ocr_vision.encoding.table import Problem
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import IMAGE_FORMATS, open_image, read_image
from deepseek_ocr_vision.saving.checksums import sha256_of


if TYPE_CHECKING:
    import datasets


DPI = 144
"""Pixels an inch that the pages of PDFs are rendered with, as in DeepSeek's own code for PDFs."""
_POINTS_PER_INCH = 72
_NEW_SUBFILE_TYPE = 254  # a tag of TIFF
_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
_OTHER_SUFFIXES = {".pdf", ".heic", ".heif"}  # beside those that Pillow knows by itself
Content = str | bytes
"""A file's path, as the system has it, or what is in the file."""


# Files


@contextmanager
def _in_words() -> Iterator[None]:
    """Make an error of ours of what decoders raise: PdfiumError, SyntaxError, struct.error, EOFError, ..."""
    try:
        yield
    except (ImportError, MemoryError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"it cannot be read: {type(error).__name__}: {error}") from error


@_in_words()
def find_pages_in(content: Content, source: str) -> tuple[list[Page], str | None]:
    """The pages of an image or of a document, a PDF or a TIFF of several pages, and which of its frames are none.

    Raises:
        OSError: The file cannot be read, or is none that is known.
        ValueError: It is a PDF that is broken, encrypted or without pages.
    """
    digest = digest_of(content)
    with closing(_open(content)) as document:
        is_image = isinstance(document, Image.Image)
        frames = range(getattr(document, "n_frames", 1) if is_image else len(document))
        if is_image and (document.format != "TIFF" or len(frames) == 1):
            return [Page(digest, source, 0)], "frames after the first" if len(frames) > 1 else None
        numbers = [number for number in frames if not (is_image and _is_copy(document, number))]
    left_out = "smaller copies in a TIFF" if len(numbers) < len(frames) else None
    return [Page(f"{digest}:{number}", source, number) for number in numbers], left_out


def _is_copy(image: Image.Image, number: int) -> bool:
    """Whether a frame of a TIFF is a smaller copy of another, such as a thumbnail. A broken one counts as a page."""
    try:
        image.seek(number)
        return number > 0 and bool(image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & 1)  # type: ignore[attr-defined]
    except Exception:
        return False  # reading it says what is wrong


@_in_words()
def open_page(page: Page, contents: Mapping[str, "Column | bytes"], *, dpi: float) -> Image.Image:
    """A page, as far as Pillow opens it.

    Args:
        page: The page.
        contents: What there is under the names of sources that are no paths of files.
        dpi: Pixels an inch that a PDF is rendered with.

    Raises:
        OSError, ValueError: It cannot be read, or the file has changed.
    """
    content = contents.get(page.source, page.source)
    if isinstance(content, Column):
        return content.read(page)
    digest, _, number = page.id.partition(":")
    document = _open_same(content, digest, os.getpid())
    return _page_of(document, int(number), dpi) if number else document


def page_of(path: str | os.PathLike, number: int, *, dpi: float) -> Image.Image:
    """A page of a file in RGB, upright: of a PDF or a TIFF the one with that number, and an image is page 1 of itself.

    Args:
        path: The file.
        number: Which page, from 1.
        dpi: Pixels an inch that a PDF is rendered with.

    Raises:
        ValueError: There is no such page, or it cannot be read as it stands.
        OSError: The file is missing, broken, or of no format that is read.
    """
    path = os.fspath(path)
    try:
        pages, _ = find_pages_in(path, path)
        if not 1 <= number <= len(pages):
            raise ValueError(f"there is no page {number}; pages go from 1 to {len(pages)}.")
        return _in_rgb(open_page(pages[number - 1], {}, dpi=dpi))
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{path}: {error}") from error
    finally:
        close_documents()


@lru_cache
def _read_heic() -> None:
    """Let Pillow read HEIC images in this process where pillow-heif is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _in_rgb(image: Image.Image) -> Image.Image:
    rgb: Any = read_image(image, "the image", input_data_format=None, do_convert_rgb=True, keeps_tensor=False)[0]
    return rgb


def digest_of(content: Content) -> str:
    """SHA-256 of what is in a file."""
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)


@lru_cache(maxsize=1)
def _open_same(content: Content, digest: str, process: int) -> Any:
    """The file that this process read last. Two processes that share an open file share their place in it."""
    if digest_of(content) != digest:
        raise ValueError("the file changed while it was being encoded.")
    return _open(content)


def close_documents() -> None:
    """Close the file that this process read last."""
    _open_same.cache_clear()


def _open(content: Content) -> Any:
    """A PDF, whose mark stands near the beginning, as PDFium has it, or an image as Pillow has it."""
    file = io.BytesIO(content) if isinstance(content, bytes) else io.FileIO(content)
    if b"%PDF-" not in file.read(1024):
        file.seek(0)
        _read_heic()
        return open_image(file, "the file")
    file.close()
    pypdfium2 = require("pypdfium2", "Reading PDFs", extra="encode")
    try:
        document = pypdfium2.PdfDocument(content if isinstance(content, bytes) else os.path.abspath(content))
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"the PDF cannot be opened; it is encrypted or broken: {error}") from error
    if len(document) == 0:
        raise ValueError("the PDF has no pages.")
    document.init_forms()  # or what is filled into a form is not rendered
    return document


def _page_of(document: Any, number: int, dpi: float) -> Image.Image:
    """A page of a TIFF or a PDF."""
    if isinstance(document, Image.Image):
        vars(document).pop("tell", None)  # of the page before
        document.seek(number)
        document.tell = lambda: 0  # type: ignore[method-assign]  # readers take a file's first frame: it is its only one
        return document
    with closing(document[number]) as page:
        scale = dpi / _POINTS_PER_INCH
        width, height = (math.ceil(side * scale) for side in page.get_size())
        limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        if width * height > limit:
            raise ValueError(f"at {dpi:g} dpi the page has {width} x {height} pixels, over {limit}.")
        return page.render(scale=scale).to_pil()


# Datasets


@dataclass(frozen=True)
class Column:
    """A column of images, or of lists of them (`is_list`), of a dataset.

    `rows` is the column alone, not decoded; `mode` is what `datasets` converts its images to, such as `"RGB"`.
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

    def pages(self) -> Iterator[list[Page]]:
        """The images of each row. One that cannot be read has a `Failure` for its id."""
        for row in range(len(self.rows)):
            ids = [attempt(lambda image: digest_of(content_of(image)), image) for image in self._cell(row)]
            yield [Page(id, self.name, row, index) for index, id in enumerate(ids)]

    def _cell(self, row: int) -> list[Any]:
        (cell,) = self.rows[row : row + 1][self.column].to_pylist()
        return cell if isinstance(cell, list) else [] if cell is None else [cell]

    def read(self, page: Page) -> Image.Image:
        image = _open_same(content_of(self._cell(page.number)[page.index]), page.id, os.getpid())
        if self.mode is None:
            return image
        # What has more than 256 levels is brought to as many first.
        return _in_rgb(image).convert("L" if self.mode.startswith(("I", "F")) else self.mode)


def content_of(image: Any) -> Content:
    """The file of an image as `datasets` stores it: `bytes` and `path`, one of which may be `None`, or a path."""
    if image is None:
        raise ValueError("the image is None; leave it out of the list.")
    if isinstance(image, str):
        return image
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"]
    if "::" in path and not os.path.exists(path):  # inside of an archive, as `datasets` names it
        with fsspec.open(path, "rb") as file:
            return file.read()
    return path


# Preparing


@dataclass(frozen=True)
class Prepare:
    """Reads pages, as `open_page` does, and prepares them as the model takes them; what workers do."""

    contents: Mapping[str, Column | bytes]
    image_processor: Any
    dtype: torch.dtype
    dpi: float = DPI

    def __call__(self, page: Page) -> Inputs:
        inputs = self.image_processor(open_page(page, self.contents, dpi=self.dpi), return_tensors="pt")
        # The model casts pixels to its dtype anyway; here it halves what goes from process to process.
        return {name: value.to(self.dtype) if torch.is_tensor(value) else value for name, value in inputs.items()}


# Finding


@dataclass
class Found:
    """What inputs name: pages, the datasets that some are in, what cannot be opened, and what is left out by kind.

    Left out is what is no image or document, of animations all but the first frame, and smaller copies in a TIFF.
    """

    pages: list[Page] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def find_pages(
    inputs: Sequence[str | os.PathLike],
    *,
    split: str = "train",
    image_column: str = "image",
    num_workers: int = 0,
    timeout: float | None = None,
) -> Found:
    """The pages that inputs name, sorted by source and number.

    Raises:
        FileNotFoundError: There is no such file, folder or dataset.
        ImportError: There is a PDF among them, and pypdfium2 is not installed.
        TypeError: A column of a dataset holds something else than images.
        ValueError: A dataset has no such split or column.
    """
    found = Found()
    is_named: dict[str, bool] = {}
    for given in [os.fspath(each) for each in inputs]:
        if _is_dataset(given):
            _find_rows(Column.of(_loaded_dataset(given, split), given, image_column), found)
        elif os.path.isdir(given):
            is_named |= dict.fromkeys(_files_in(given, found.left_out), False)
        elif os.path.exists(given):
            is_named[given] = True
        else:
            raise FileNotFoundError(f"There is no file, folder or dataset {given!r}.")
    if any(path.lower().endswith(".pdf") for path in is_named):
        require("pypdfium2", "Reading PDFs", extra="encode")
    limit = None if timeout is None else 10 * timeout  # a file is read as a whole, whatever its size
    for path, pages in map_in_processes(_find_file, is_named, num_workers=num_workers, ahead=100, timeout=limit):
        _sort_in(path, pages, found, is_named=is_named[path])
    found.pages.sort(key=lambda page: page[1:])
    found.problems.sort(key=lambda each: (each.source, each.page or 0))
    return found


def _find_file(path: str) -> tuple[list[Page], str | None]:
    if not os.path.isfile(path):
        raise FileNotFoundError("it is no file, or a link to one that is not there.")
    return find_pages_in(path, path)


def _sort_in(path: str, result: tuple[list[Page], str | None] | Failure, found: Found, *, is_named: bool) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if not isinstance(result, Failure):
        pages, left_out = result
        found.pages += pages
        if left_out is not None:
            found.left_out[left_out].append(printable(path))
    # A file of a folder may be anything; one that was named, or calls itself an image, should be readable.
    elif is_named or suffix in _known_suffixes() or not os.path.isfile(path):
        found.problems.append(Problem(printable(path), None, result))
    else:
        found.left_out[printable(suffix) or "no suffix"].append(printable(path))


@lru_cache
def _known_suffixes() -> set[str]:
    _read_heic()
    formats = Image.registered_extensions()
    return {suffix for suffix, kind in formats.items() if kind in IMAGE_FORMATS} | _OTHER_SUFFIXES


def _find_rows(column: Column, found: Found) -> None:
    found.columns[column.name] = column
    for row, pages in enumerate(column.pages()):
        if len(pages) == 1 and not isinstance(pages[0].id, Failure):
            found.pages += pages
            continue
        many = f"ValueError: the row has {len(pages) or 'no'} image{'s' * (len(pages) > 1)}."
        error = pages[0].id if len(pages) == 1 else many
        found.problems.append(Problem(printable(column.name), row, error))


def _is_dataset(given: str) -> bool:
    path = Path(given)
    if path.exists():
        return any((path / name).is_file() for name in _DATASET_FILES)
    # What could be a file's name is a file that is missing, not a dataset to ask the Hub for.
    looks_like_a_file = path.suffix.lower() in _known_suffixes() or path.is_absolute()
    return not looks_like_a_file and len(path.parts) in (1, 2) and path.parts[0] not in ("~", "..")


def _files_in(path: str, left_out: dict[str, list[str]]) -> Iterator[str]:
    """All files in a folder and in those inside it, also by links; hidden ones are left out."""
    seen = {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, onerror=_raise, followlinks=True):
        for name in [*folders, *names]:
            if name.startswith("."):
                left_out["hidden"].append(printable(os.path.join(folder, name)))
        visible, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
        for name in visible:
            target = os.path.realpath(os.path.join(folder, name))
            if target not in seen:
                folders.append(name)
                seen.add(target)
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _loaded_dataset(name: str, split: str) -> "datasets.Dataset":
    import datasets

    if not os.path.isdir(name):
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
