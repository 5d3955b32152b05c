"""Files and folders that are written atomically."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move what was written there to `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.tmp-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        if path.is_dir():
            # A folder cannot take the place of another; the old one goes when the temporary folder does.
            os.replace(path, Path(folder) / "old")
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")
