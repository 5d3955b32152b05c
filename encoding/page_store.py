"""A folder of encoded pages, which `datasets` reads as it is.

    <folder>/state.json, dataset_info.json   what `datasets.load_from_disk` reads first, written last
    <folder>/errors.jsonl                    what could not be encoded, a line each; not there if there is nothing
    <folder>/.work/<page>.error              one of these lines

and what every `TokenStore` has: `settings.json` and the Arrow files.

Letters in the shapes: N tokens of a page, C channels.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from filelock import FileLock

from deepseek_ocr_vision.encoding.sources import Problem, Source
from deepseek_ocr_vision.encoding.token_store import (
    SETTINGS,
    WORK,
    ReadFeatures,
    TokenStore,
    read_settings,
    tokens_column,
)


if TYPE_CHECKING:
    import datasets


LAYOUT = 1
"""Version of what is in a folder."""
ERRORS = "errors.jsonl"


class Page(NamedTuple):
    """What a page goes by: the name of its source, and its number there, counted from 0."""

    source: str
    number: int


class PageStore(TokenStore):
    """The tokens of pages, in a folder that many processes may fill.

    Args:
        folder: The folder; new, empty, or one of these with the same settings.
        settings: What the tokens depend on, in values that JSON has.
        dtype: Of the tokens, a key of `STORED_TYPES`.
        width: Channels of a token.

    Raises:
        NotADirectoryError: There is a file at `folder`.
        ValueError: The folder holds something else, tokens of other settings, or a damaged file.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any], *, dtype: torch.dtype, width: int):
        from datasets import List, Value

        self.versions: dict[str, str] = {}
        columns = {
            "source": Value("string"),
            "page": Value("int64"),
            "version": Value("string"),
            "grid": List(Value("int64")),
            "patches_grid": List(Value("int64")),
            "tokens": tokens_column(width, dtype),
        }
        _refuse_foreign(Path(folder))
        super().__init__(folder, {"layout": LAYOUT, "dtype": str(dtype), **settings}, columns=columns, dtype=dtype)

    def keys_of(self, rows: Mapping[str, list]) -> list[Page]:
        """The pages of rows. Notes which version of its source each is of."""
        self.versions.update(zip(rows["source"], rows["version"], strict=True))
        return [Page(*row) for row in zip(rows["source"], rows["page"], strict=True)]

    def refuse_changed(self, sources: Mapping[str, Source]) -> list[Problem]:
        """Sources that are not as they were when pages of them were stored."""
        changed = [
            name for name, source in sources.items() if self.versions.get(name, source.version) != source.version
        ]
        why = "it has changed since pages of it were encoded; encode it into another folder."
        return [Problem(name, None, why) for name in changed]

    # Problems

    def note(self, problem: Problem) -> None:
        """Keep why a page could not be encoded, for `finish` and for other processes."""
        note = json.dumps(asdict(problem), ensure_ascii=False) + "\n"
        self.put(self._note_of(Page(problem.source, problem.page)), note)

    def was_noted_since(self, page: Page, moment: float) -> bool:
        """Whether some process has tried a page, in vain, since a moment of `time.time()`."""
        try:
            return self._note_of(page).stat().st_mtime >= moment
        except FileNotFoundError:
            return False

    def problem_of(self, page: Page) -> Problem:
        """Why a page could not be encoded."""
        return Problem(**json.loads(self._note_of(page).read_bytes()))

    def _note_of(self, page: Page) -> Path:
        return self.work / f"{hashlib.sha256(json.dumps(page).encode()).hexdigest()[:32]}.error"

    # The end

    def finish(self, problems: Sequence[Problem]) -> None:
        """Write what `datasets.load_from_disk` reads, and `errors.jsonl`. Every process may do so; the last counts."""
        with FileLock(self.work / "finish.lock"):
            files = self._sorted_files()
            settings = (self.folder / SETTINGS).read_text()
            info = {"description": settings, "features": self.columns.to_dict()}
            if files:  # `datasets` cannot read a folder without any
                self.put(self.folder / "dataset_info.json", json.dumps(info))
                self.put(self.folder / "state.json", json.dumps(_state(files, settings), indent=1))
            lines = [json.dumps(asdict(problem), ensure_ascii=False) for problem in problems]
            self.put(self.folder / ERRORS, "".join(f"{line}\n" for line in lines))
            if not lines:
                (self.folder / ERRORS).unlink()

    def _sorted_files(self) -> list[str]:
        """The Arrow files by the first page in each, so that rows are sorted, but for what was added later."""
        first = {path.name: shard.select_columns(["source", "page"])[0] for path, shard in self.shards.items()}
        return sorted(first, key=lambda name: (first[name]["source"], first[name]["page"], name))


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder with something else in it."""
    if not folder.is_dir() or (folder / SETTINGS).exists():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name != WORK)
    if others:
        raise ValueError(
            f"`out` is {str(folder)!r}, which holds no encoded pages, but {others[0]!r}; name a new folder."
        )


def _state(files: list[str], settings: str) -> dict[str, Any]:
    """What `Dataset.save_to_disk` notes beside its files."""
    return {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": hashlib.sha256(json.dumps([settings, files]).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


# Reading


def load_pages(folder: str | os.PathLike) -> "datasets.Dataset":
    """The pages that `encode_pages` wrote, memory-mapped.

    `datasets.load_from_disk(folder)` reads the same rows without this package; there, bfloat16 comes as the int16
    numbers with the same bits, and tokens are lists unless a format says otherwise.

    Args:
        folder: What was `out`.

    Returns:
        A dataset with a row a page: `source`, `page`, `version`, `grid`, `patches_grid`, and `tokens`, a tensor [N, C]
        in the dtype that it was computed in. `info.description` holds the settings that made it, as JSON.

    Raises:
        FileNotFoundError: There are no encoded pages, or their encoding was interrupted before it ever came to an end.
        ImportError: `datasets` is not installed.
    """
    require_datasets()
    import datasets

    folder = Path(folder)
    for name in (SETTINGS, "state.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: no pages were encoded into it, or not to the end.")
    settings = read_settings(folder)
    dtype = getattr(torch, settings["dtype"].removeprefix("torch."))
    stored = datasets.load_from_disk(str(folder))
    pages = stored.remove_columns("tokens").add_column("tokens", list(range(len(stored))))
    return pages.with_transform(ReadFeatures("tokens", stored.with_format("arrow"), dtype, settings["encoder"]))


def require_datasets() -> None:
    """Say what to install where `datasets` is not."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError("Encoded pages need datasets: pip install 'deepseek-ocr-vision[encode]'") from error
