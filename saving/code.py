"""The code that a checkpoint carries: which files, and how they come to lie flat in one folder.

Code on the Hub is a flat folder of files. The package keeps the same files in folders, so staging copies them into one
folder and rewrites `from ..folder.module import` to `from .module import`; nothing else differs.
"""

import os
import re
import tempfile
from pathlib import Path

from .saving_deepseek_ocr_vision import PACKAGE


FLAT_CODE = {
    "configuration": ("configuration", "presets", "checks"),
    "modeling": ("modeling", "sequence", "loading", "sam", "clip", "base", "attention"),
    "processing": ("processing", "image_processing", "images"),
    "saving": ("saving",),
}

_CROSS_FOLDER_IMPORT = re.compile(r"^(\s*from )\.\.\w+(\.\w+ import )", flags=re.MULTILINE)


def flatten(source: str) -> str:
    """Rewrite `from ..folder.module import` to `from .module import`, the one form that transformers follows."""
    return _CROSS_FOLDER_IMPORT.sub(r"\1\2", source)


def stage_code(folder: str | os.PathLike) -> list[Path]:
    """Write the package's code, flat, into `folder`, made if missing, and give the paths of the files.

    Files that are there and equal are left alone.

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
    """Replace `path` by one rename, so that a process that is killed here leaves the old file or the new one."""
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
