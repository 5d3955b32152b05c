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
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from deepseek_ocr_vision.encoding.encoder import Inputs, Page
from deepseek_ocr_vision.encoding.processes import Failure, attempt, map_in_processes
from deepseek_ocr_vision.encoding.table import Problem
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import IMAGE_FORMATS, open_image, read_image
from deepseek_ocr_vision.saving.checksums import sha256_of


if TYPE_CHECKING:
    import datasets


_POINTS_PER_INCH = 72
_NEW_SUBFILE_TYPE = 254  # a tag of TIFF
_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
_OTHER_SUFFIXES = {".pdf", ".heic", ".heif"}  # beside those that Pillow knows by itself
Content = str | bytes
"""A file's path, as the system has it, or what is in the file."""


# Files


@dataclass(frozen=True)
class File:
    """An image, or a document: a PDF or a TIFF of several pages.

    Attributes:
        content: Its path, or its bytes.
        name: What its pages are stored under.
        dpi: Pixels an inch that the pages of a PDF are rendered with.
        digest: SHA-256 of what is in it.
        numbers: Those of its pages, from 0; `None` of an image that is no document.
        left_out: Which of its frames are no pages, if there are such.
    """

    content: Content
    name: str
    dpi: float
    digest: str
    numbers: Sequence[int] | None
    left_out: str | None = None

    @classmethod
    def find(cls, content: Content, *, name: str, dpi: float) -> "File":
        """The file, with the number of its pages.

        Raises:
            OSError: It cannot be read, or is none that is known.
            ValueError: It is a PDF that is broken, encrypted or without pages.
        """
        digest = digest_of(content)
        with closing(_open(content)) as document:
            if not isinstance(document, Image.Image):
                return cls(content, name, dpi, digest, range(len(document)))
            frames = range(getattr(document, "n_frames", 1))
            if document.format != "TIFF" or len(frames) == 1:
                return cls(content, name, dpi, digest, None, "frames after the first" if len(frames) > 1 else None)
            numbers = [number for number in frames if not _is_copy(document, number)]
            left_out = "smaller copies in a TIFF" if len(numbers) < len(frames) else None
            return cls(content, name, dpi, digest, numbers, left_out)

    def pages(self) -> list[Page]:
        if self.numbers is None:
            return [Page(self.digest, self.name, 0)]
        return [Page(f"{self.digest}:{number}", self.name, number) for number in self.numbers]

    def read(self, page: Page) -> Image.Image:
        document = _open_same(self.content, self.digest, os.getpid())
        if self.numbers is None:
            return document
        try:
            return _page_of(document, page.number, self.dpi)
        except (MemoryError, OSError, ValueError):
            raise
        except Exception as error:
            # As broken bytes lead them, decoders raise PdfiumError, SyntaxError, struct.error, EOFError, ...
            raise ValueError(f"the page cannot be read: {type(error).__name__}: {error}") from error


def _is_copy(image: Image.Image, number: int) -> bool:
    """Whether a frame of a TIFF is a smaller copy of another, such as a thumbnail. A broken one counts as a page."""
    try:
        image.seek(number)
        return number > 0 and bool(image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & 1)  # type: ignore[attr-defined]
    except Exception:
        return False  # reading it says what is wrong


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
    _read_heic()
    try:
        file = File.find(os.fspath(path), name=os.fspath(path), dpi=dpi)
        pages = file.pages()
        if not 1 <= number <= len(pages):
            raise ValueError(f"there is no page {number}; pages go from 1 to {len(pages)}.")
        return _in_rgb(file.read(pages[number - 1]))
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{os.fspath(path)}: {error}") from error
    finally:
        close_documents()


def _read_heic() -> None:
    """Read HEIC images as well where pillow-heif is installed."""
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
        return open_image(file, "the file")
    file.close()
    pypdfium2 = require_pypdfium2()
    try:
        document = pypdfium2.PdfDocument(content)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"the PDF cannot be opened; it is encrypted or broken: {error}") from error
    if len(document) == 0:
        raise ValueError("the PDF has no pages.")
    document.init_forms()  # or what is filled into a form is not rendered
    return document


def require_pypdfium2() -> Any:
    """Say what to install where pypdfium2 is not."""
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("Reading PDFs needs pypdfium2: pip install 'deepseek-ocr-vision[encode]'") from error
    return pypdfium2


def _page_of(document: Any, number: int, dpi: float) -> Image.Image:
    """A page of a TIFF or a PDF."""
    if isinstance(document, Image.Image):
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
    """A column of images, or of lists of them, of a dataset.

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

    def pages(self) -> Iterator[list[tuple[Page, Failure | None]]]:
        """The images of each row, and why some have no id."""
        for row in range(len(self.rows)):
            pages = []
            for index, image in enumerate(self._cell(row)):
                digest = attempt(lambda image: digest_of(_content_of(image)), image)
                failure = digest if isinstance(digest, Failure) else None
                pages.append((Page("" if failure else digest, self.name, row, index), failure))
            yield pages

    def _cell(self, row: int) -> list[Any]:
        (cell,) = self.rows[row : row + 1][self.column].to_pylist()
        return cell if isinstance(cell, list) else [] if cell is None else [cell]

    def read(self, page: Page) -> Image.Image:
        image = _open_same(_content_of(self._cell(page.number)[page.index]), page.id, os.getpid())
        if self.mode is None:
            return image
        # What has more than 256 levels is brought to as many first.
        return _in_rgb(image).convert("L" if self.mode.startswith(("I", "F")) else self.mode)


def _content_of(image: Any) -> Content:
    """The file of an image as `datasets` stores it: `bytes` and `path`, one of which may be `None`, or a path."""
    if image is None:
        raise ValueError("the image is None; leave it out of the list.")
    if isinstance(image, str):
        return image
    return image["path"] if image["bytes"] is None else image["bytes"]


# Preparing


@dataclass(frozen=True)
class Prepare:
    """Reads pages and prepares them as the model takes them; what workers do."""

    sources: Mapping[str, File | Column]
    image_processor: Any
    dtype: torch.dtype

    def __call__(self, page: Page) -> Inputs:
        inputs = self.image_processor(self.sources[page.source].read(page), return_tensors="pt")
        # The model casts pixels to its dtype anyway; here it halves what goes from process to process.
        return {name: value.to(self.dtype) if torch.is_tensor(value) else value for name, value in inputs.items()}


# Finding


@dataclass
class Found:
    """What inputs name: files and datasets by name, their pages, what cannot be opened, and what is left out by kind.

    Left out is what is no image or document, of animations all but the first frame, and smaller copies in a TIFF.
    """

    sources: dict[str, File | Column] = field(default_factory=dict)
    pages: list[Page] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def find_pages(
    inputs: Sequence[str | os.PathLike],
    *,
    dpi: float,
    split: str,
    image_column: str,
    num_workers: int,
    timeout: float | None,
) -> Found:
    """The pages that inputs name, sorted by source and number.

    Raises:
        FileNotFoundError: There is no such file, folder or dataset.
        ImportError: There is a PDF among them, and pypdfium2 is not installed.
        TypeError: A column of a dataset holds something else than images.
        ValueError: A dataset has no such split or column.
    """
    _read_heic()
    found = Found()
    paths: dict[str, bool] = {}
    for given in [os.fspath(each) for each in inputs]:
        if _is_dataset(given):
            _find_rows(Column.of(_loaded_dataset(given, split), given, image_column), found)
        elif os.path.isdir(given):
            paths |= dict.fromkeys(_files_in(given, found.left_out), False)
        elif os.path.exists(given):
            paths[given] = True
        else:
            raise FileNotFoundError(f"There is no file, folder or dataset {given!r}.")
    if any(path.lower().endswith(".pdf") for path in paths):
        require_pypdfium2()
    limit = None if timeout is None else 10 * timeout  # a file is read as a whole, whatever its size
    files = map_in_processes(partial(_find_file, dpi), paths, num_workers=num_workers, ahead=100, timeout=limit)
    for path, file in files:
        _sort_in(path, file, found, is_named=paths[path])
    found.pages.sort(key=lambda page: page[1:])
    found.problems.sort(key=lambda each: (each.source, each.page or 0))
    return found


def _find_file(dpi: float, path: str) -> File:
    if not os.path.isfile(path):
        raise FileNotFoundError("it is no file, or a link to one that is not there.")
    return File.find(path, name=printable(path), dpi=dpi)


def printable(path: str) -> str:
    r"""A path as text that can be stored; bytes that are not UTF-8 as `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _sort_in(path: str, file: File | Failure, found: Found, *, is_named: bool) -> None:
    name, suffix = printable(path), os.path.splitext(path)[1].lower()
    if isinstance(file, File):
        found.sources[name] = file
        found.pages += file.pages()
        if file.left_out is not None:
            found.left_out[file.left_out].append(name)
    # A file of a folder may be anything; one that was named, or calls itself an image, should be readable.
    elif is_named or suffix in _known_suffixes() or not os.path.isfile(path):
        found.problems.append(Problem(name, None, file))
    else:
        found.left_out[printable(suffix) or "no suffix"].append(name)


@lru_cache
def _known_suffixes() -> set[str]:
    formats = Image.registered_extensions()
    return {suffix for suffix, kind in formats.items() if kind in IMAGE_FORMATS} | _OTHER_SUFFIXES


def _find_rows(column: Column, found: Found) -> None:
    found.sources[column.name] = column
    for row, pages in enumerate(column.pages()):
        if len(pages) != 1:
            error = f"ValueError: the row has {len(pages) or 'no'} image{'s' * (len(pages) > 1)}."
            found.problems.append(Problem(column.name, row, error))
            continue
        ((page, failure),) = pages
        if failure is None:
            found.pages.append(page)
        else:
            found.problems.append(Problem(column.name, row, failure))


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
