"""Where something is written: beside its place first, and moved there in one step when it is whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_one_step(target: str | os.PathLike) -> Iterator[Path]:
    """A path to write a folder or a file to, which becomes `target` at the end; on an error nothing is left of it.

    Args:
        target: A name that is free, or of an empty folder.

    Raises:
        FileExistsError: There is something at `target`.
    """
    target = Path(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; name a new one, or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as temporary:
        partial = Path(temporary) / target.name
        yield partial
        os.replace(partial, target)
