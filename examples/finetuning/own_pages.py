"""Your own pages: opened, with the place of each page in your files, and not yet looked at.

Tables that name image files, `metadata.jsonl` or a CSV, are read here, as they are written: a number stays the text
that it is in a CSV, and a mistake is named with its line. Whatever else `datasets` opens is opened by it.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from torch.utils.data import Dataset

from deepseek_ocr_vision.encoding.sources import content_of
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import open_image, read_image


SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Finding:
    """Something about the data that the user should know.

    Attributes:
        kind: What it is; findings of a kind are listed together.
        place: Where: file and line, or split and row.
        detail: What is special about this one.
        is_error: Whether nothing can be trained like this.
    """

    kind: str
    place: str
    detail: str = ""
    is_error: bool = True


@dataclass
class Table:
    """Rows of a split, in order.

    Attributes:
        images: Of each row the path of its image, or its bytes.
        texts: Of each row what is written there, unchecked.
        places: Of each row where it is found.
    """

    images: Sequence[Any] = field(default_factory=list)
    texts: Sequence[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.places)

    def add(self, image: Any, text: Any, place: str) -> None:
        """One more row."""
        self.images.append(image)
        self.texts.append(text)
        self.places.append(place)


class OwnPages(Dataset):
    """Some rows of a table as pages: `image`, upright and in RGB, and `text`.

    Args:
        table: The rows.
        rows: Which of them, in order; by default all.
    """

    def __init__(self, table: Table, rows: Sequence[int] | None = None):
        self.table = table
        self.rows = range(len(table)) if rows is None else list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Page `index`: `image`, a PIL image in RGB, and `text`."""
        row = self.rows[index]
        image = decoded(image_bytes(self.table.images[row]), self.table.places[row])
        return {"image": image, "text": self.table.texts[row]}


def image_bytes(source: str | Path | dict[str, Any] | None) -> bytes:
    """The file behind an image: at a path, or in a row of a dataset."""
    if source is None:
        raise ValueError("there is no image")
    content = content_of(source if isinstance(source, dict) else os.fspath(source))
    return content if isinstance(content, bytes) else Path(content).read_bytes()


def decoded(content: bytes, name: str) -> Image.Image:
    """An image file as the encoder sees it: the first frame, upright, in RGB over white paper.

    Raises:
        ValueError: It has more pixels than Pillow allows.
        OSError: It is broken, or no image.
    """
    options = {"input_data_format": None, "do_convert_rgb": True, "keeps_tensor": False}
    return read_image(open_image(BytesIO(content), name), name, **options)[0]


# Opening


def open_tables(source: str, *, image_column: str, text_column: str) -> tuple[dict[str, Table], list[Finding]]:
    """Open the user's data: a table for each split, and what is wrong with lines that cannot be read.

    Args:
        source: A folder with `metadata.jsonl` or CSV files, or one such file; a folder that `save_to_disk` wrote; or
            whatever else `datasets.load_dataset` takes.
        image_column: Where the image is; in a file of one's own it may also be called `file_name`.
        text_column: Where the text is.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are not the columns.
    """
    path = Path(source).expanduser()
    files = table_files(path)
    if files:
        return read_files(files, path, image_column=image_column, text_column=text_column)
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~"))):
        raise FileNotFoundError(f"--data: there is no folder {source}.")
    is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    opened = datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset(source)
    if isinstance(opened, datasets.Dataset):
        opened = {"train": opened}
    columns = {"image_column": image_column, "text_column": text_column}
    return {name: table_of(split, name, **columns) for name, split in opened.items()}, []


def table_of(split: datasets.Dataset, name: str, *, image_column: str, text_column: str) -> Table:
    """A split of a dataset."""
    require_columns(split.column_names, image_column=image_column, text_column=text_column)
    images = split.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    places = [f"split {name!r}, row {row}" for row in range(len(split))]
    return Table(Column(images, image_column), Column(split.select_columns([text_column]), text_column), places)


class Column(Sequence):
    """A column of a dataset, read row by row."""

    def __init__(self, split: datasets.Dataset, name: str):
        self.split, self.name = split, name

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Any:
        return self.split[row][self.name]


def require_columns(found: Sequence[str], *, image_column: str, text_column: str) -> None:
    """Refuse data without the columns asked for."""
    for column, option in ((image_column, "--image_column"), (text_column, "--text_column")):
        if column not in found:
            raise ValueError(f"The data has no column {column!r} but {list(found)}; name it by {option}.")


def table_files(path: Path) -> list[Path]:
    """The files that name images: a folder's `metadata` files, or all its CSV and JSON-lines files."""
    if path.is_file():
        return [path] if path.suffix in (".jsonl", ".csv") else []
    files = sorted(file for suffix in ("jsonl", "csv") for file in path.rglob(f"*.{suffix}") if file.is_file())
    return [file for file in files if file.stem == "metadata"] or files


def split_of(name: str) -> str | None:
    """The split that a path names, by the words that `datasets` knows, such as in `val/page.png` or `train-0.csv`."""
    for word in re.split(r"[^a-z]+", name.lower()):
        for split, words in SPLIT_NAMES.items():
            if word in words:
                return split
    return None


# Files of one's own


def read_files(
    files: list[Path], source: Path, *, image_column: str, text_column: str
) -> tuple[dict[str, Table], list[Finding]]:
    """Read tables that name images relative to where they lie.

    A row belongs to the split that its file's path names, or that it names itself, in a column `split` or as the
    first folder of its image's path.
    """
    rows, findings = [], []
    for file in files:
        split = split_of(str(file.relative_to(source)) if source.is_dir() else "")
        for place, row in read_rows(file, findings):
            rows.append((split, file.parent, place, row))
    columns = list(dict.fromkeys(name for _, _, _, row in rows for name in row))
    image_name = image_column if image_column in columns or image_column != "image" else "file_name"
    if rows:
        require_columns(columns, image_column=image_name, text_column=text_column)
    inner = [row_split(row, image_name) for _, _, _, row in rows]
    use_inner = {"train"} < set(inner)
    tables: dict[str, Table] = {}
    for (split, folder, place, row), own in zip(rows, inner, strict=True):
        name = split or (own if use_inner else "train")
        if name is None:
            findings.append(Finding("rows in no split, beside others whose path begins with a split's name", place))
            continue
        image = image_path(row.get(image_name), folder, source)
        if image is None:
            findings.append(Finding("images that are not in the folder of the data", place, str(row.get(image_name))))
        else:
            tables.setdefault(name, Table()).add(image, row.get(text_column), place)
    return tables or {"train": Table()}, findings


def image_path(name: Any, folder: Path, source: Path) -> Path | None:
    """Where an image lies that a table in `folder` names, unless that is outside of the data that the user gave."""
    root = source if source.is_dir() else source.parent
    path = Path(os.path.normpath(folder / name)) if isinstance(name, str) and name else None
    return path if path is not None and path.is_relative_to(os.path.normpath(root)) else None


def row_split(row: dict[str, Any], image_name: str) -> str | None:
    """The split that a row names itself."""
    named = row.get("split")
    if isinstance(named, str):
        return split_of(named)
    first, separator, _ = str(row.get(image_name) or "").partition("/")
    return split_of(first) if separator else None


def read_rows(file: Path, findings: list[Finding]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place; lines that cannot be read are added to the findings."""
    content = file.read_bytes()
    if content.startswith(BYTE_ORDER_MARK):
        findings.append(Finding("byte-order marks at the start of a file, passed over", str(file), is_error=False))
        content = content.removeprefix(BYTE_ORDER_MARK)
    read = read_csv if file.suffix == ".csv" else read_json_lines
    for line, row in read(content, file, findings):
        yield f"{file}, line {line}", row


def read_json_lines(content: bytes, file: Path, findings: list[Finding]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines that are JSON objects. Only a newline ends a line; U+2028 inside a string does not."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # not UTF-8, or not JSON
            findings.append(Finding("lines that are not JSON in UTF-8", place, str(error)))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            findings.append(Finding("lines that are not JSON objects", place, line[:40].decode("utf-8", "replace")))


def read_csv(content: bytes, file: Path, findings: list[Finding]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Records of a CSV file, all of them text, under the line on which each begins."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        findings.append(Finding("files that are not UTF-8", f"{file}, line {line}", str(error)))
        return
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    if reader.fieldnames is None:
        return
    while True:
        begin = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            findings.append(Finding("CSV records that cannot be read", f"{file}, line {begin}", str(error)))
            return
        if row.pop(None, None) is not None:
            findings.append(Finding("CSV records with more fields than the heading", f"{file}, line {begin}"))
            continue
        yield begin, row
