"""Staging folders: whatever is written is complete before it gets its name, and what killed processes left is removed.

A staging folder is locked by the process that writes into it. The system releases the lock when the process ends, in
whatever way, so the next process in the same place knows which staging folders nobody needs any more.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows, where staging folders of killed processes stay
    fcntl = None  # type: ignore[assignment]

PREFIX = ".deepseek_ocr_vision-"
_ATTEMPTS = 5


@contextmanager
def staging_folder(place: str | os.PathLike) -> Iterator[Path]:
    """A new, locked folder in `place`, a folder on the disk that the result belongs on, removed at the end.

    Those of killed processes in `place` are removed first.
    """
    place = Path(place)
    _remove_abandoned(place)
    folder, descriptor = _make_locked_folder(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(descriptor)


@contextmanager
def atomic_write(target: str | os.PathLike) -> Iterator[Path]:
    """A path to write a folder or a file to, which becomes `target` in one rename; on an error nothing is left of it.

    Raises:
        FileExistsError: There is something at `target` that is no empty folder.
    """
    target = Path(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()) or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; name a new one, or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(target.parent) as folder:
        yield folder / target.name
        os.replace(folder / target.name, target)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that lock `folder` waiting. Only ever for moments in which nobody waits for them."""
    descriptor = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(descriptor)


def _remove_abandoned(place: Path) -> None:
    """Remove the staging folders in `place` whose lock is free. Where a disk has no locks they stay."""
    for folder in place.glob(f"{PREFIX}*"):
        # Whoever may write into a shared temporary folder could put a link there.
        if folder.is_symlink() or not folder.is_dir():
            continue
        descriptor = _lock(folder, wait=False)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(descriptor)


def _make_locked_folder(place: Path) -> tuple[Path, int | None]:
    """A new folder and its lock; `None` on disks without locks.

    Between its making and its locking another process may take the folder for an abandoned one.
    """
    for _ in range(_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        descriptor = _lock(folder, wait=False)
        if folder.is_dir() and (descriptor is not None or fcntl is None):
            return folder, descriptor
        _unlock(descriptor)
        with suppress(OSError):
            folder.rmdir()
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)), None


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder until it is unlocked or the process dies; `None` if it is locked, gone, or cannot be locked."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None and fcntl is not None:
        # Closing alone would leave the lock to processes that were forked meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
