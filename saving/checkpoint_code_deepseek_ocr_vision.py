"""The code that a checkpoint carries, so that it loads where this package is not installed.

Code on the Hub is a flat folder of files, named by `auto_map` in the JSON files beside them. The package keeps the
same files in folders, so staging copies them into one folder and rewrites `from ..folder.module import` to
`from .module import`; nothing else differs. Saved again from a staged copy, only the names in `auto_map` are ours to
write: transformers itself copies the code of classes that it loaded with `trust_remote_code`.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


PACKAGE = "deepseek_ocr_vision"
CHECKSUMS = "SHA256SUMS"
IN_PACKAGE = __name__.startswith(f"{PACKAGE}.")
NEEDS_PACKAGE = (
    "This needs the package deepseek-ocr-vision; what a checkpoint carries of it only loads, runs and trains."
)
FLAT_CODE = {
    "configuration": ("configuration", "presets", "checks"),
    "modeling": ("modeling", "sequence", "loading", "sam", "clip", "base", "attention"),
    "processing": ("processing", "image_processing", "images", "tiles"),
    "saving": ("saving", "checkpoint_code", "checksums"),
}
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek_ocr_vision.DeepSeekOCRVisionConfig",
    "AutoModel": "modeling_deepseek_ocr_vision.DeepSeekOCRVisionModel",
    "AutoImageProcessor": "image_processing_deepseek_ocr_vision.DeepSeekOCRVisionImageProcessor",
    "AutoProcessor": "processing_deepseek_ocr_vision.DeepSeekOCRVisionProcessor",
}

_CROSS_FOLDER_IMPORT = re.compile(r"^(\s*from )\.\.\w+(\.\w+ import )", flags=re.MULTILINE)


def flatten(source: str) -> str:
    """Rewrite `from ..folder.module import` to `from .module import`, the one form that transformers follows."""
    return _CROSS_FOLDER_IMPORT.sub(r"\1\2", source)


def stage_code(folder: str | os.PathLike) -> list[Path]:
    """Write the package's code, flat, into `folder`, made if missing. Files that are there and equal are left alone.

    Args:
        folder: Where the files go.

    Returns:
        The paths of the files, all directly in `folder`.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a checkpoint is saved into a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parent.parent
    sources = [root / part / f"{name}_{PACKAGE}.py" for part, names in FLAT_CODE.items() for name in names]
    return [_write_if_changed(folder / source.name, flatten(source.read_text("utf-8"))) for source in sources]


def _write_if_changed(path: Path, text: str) -> Path:
    """Replace `path` in one step, so that a process that is killed here leaves the old file or the new one."""
    if path.is_file() and path.read_bytes() == text.encode("utf-8"):
        return path
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@contextmanager
def checkpoint_code(save_directory: str | os.PathLike, *parts: Any) -> Iterator[None]:
    """Put the code into a folder, and its names into the JSON files of what is saved there meanwhile.

    Args:
        save_directory: Where the checkpoint goes.
        parts: Objects that are saved, whose `code_entries` are the Auto classes that load them.

    Raises:
        NotADirectoryError: `save_directory` is a file.
    """
    if IN_PACKAGE:
        stage_code(save_directory)
    # They are those of the files that are about to be replaced.
    Path(save_directory, CHECKSUMS).unlink(missing_ok=True)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_with_auto_map(part))
        yield


@contextmanager
def _with_auto_map(part: Any) -> Iterator[None]:
    """Name the code of `part` while it is saved: the `auto_map` belongs to the folder, not to the object."""
    before = vars(part).get("auto_map")
    part.auto_map = {entry: AUTO_MAP[entry] for entry in part.code_entries}
    try:
        yield
    finally:
        del part.auto_map
        if before is not None:
            part.auto_map = before


__all__ = ["AUTO_MAP", "CHECKSUMS", "IN_PACKAGE", "NEEDS_PACKAGE", "checkpoint_code", "flatten", "stage_code"]
