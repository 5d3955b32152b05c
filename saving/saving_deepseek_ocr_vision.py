"""Saves that an interruption cannot break: what was there before still loads, or what is saved does, bit for bit.

transformers writes into the folder itself, file by file. Killed on the way, or on a full disk, it leaves weights that
are cut, or those of one model under the configuration of another. Here everything is written aside first. Then the
new weights are moved into the folder under names of their own, and `config.json` is replaced in one step by one that
names them, by transformers' own key `transformers_weights`: whoever loads the folder reads the old checkpoint until
then and the new one from then on. Last, the weights get their usual names. Where that was interrupted, the next save
into the folder finishes it first.

What is written aside lies in `.cache/huggingface` of the folder: on its disk, and where huggingface_hub never uploads
from. The next save removes what a dead process has left there.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoint_code_deepseek_ocr_vision import CHECKSUMS, checkpoint_code


try:
    import fcntl
except ImportError:
    # Windows has no such locks. Two processes should not save into one folder at once there.
    fcntl = None

_ASIDE = Path(".cache", "huggingface")
_PREFIX = "deepseek_ocr_vision-"
_PENDING = "pending-"
_POINTER = "transformers_weights"
_HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


class AtomicSavingMixin:
    """For classes of transformers with a `save_pretrained`: the same, but atomic, and with the code that loads it."""

    def parts_to_save(self) -> list[Any]:
        """The objects in the checkpoint whose `code_entries` are the Auto classes that load them."""
        return [self]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save as transformers does, with the code that loads the folder where this package is not installed.

        An interruption at any point is harmless: see `save_atomically`.

        Args:
            save_directory: The folder.
            push_to_hub: Whether to upload it as well.
            kwargs: As in transformers.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            OSError: The folder cannot be written to, or the disk is full.
        """
        save = super().save_pretrained
        return save_atomically(self, save, save_directory, *self.parts_to_save(), push_to_hub=push_to_hub, **kwargs)


def save_atomically(
    saved: Any,
    save: Callable,
    save_directory: str | os.PathLike,
    *parts: Any,
    publish: bool = True,
    push_to_hub: bool = False,
    **options: Any,
) -> list[str] | None:
    """Save a model, a configuration or a processor with its code, so that an interruption at any point is harmless.

    Killed, or stopped by an error, at whatever point: the folder loads as what was there before or as what is saved
    now, bit for bit. Two exceptions: the weights of a `variant` are replaced file by file, and an interruption can
    leave a variant of several files that does not load; and code files of two versions of this package can be left
    side by side. The disk has to hold the old weights and the new ones at once.

    Args:
        saved: What is saved.
        save: transformers' own `save_pretrained` of it.
        save_directory: The folder.
        parts: Objects that are saved, whose `code_entries` are the Auto classes that load them.
        publish: Whether this process is the one that writes. Others take part in gathering the weights.
        push_to_hub: Whether to upload the files as well, once they are in their place.
        options: What `save` takes, and what `push_to_hub` of transformers takes.

    Returns:
        What `save` returns: `None`, or the paths of files.

    Raises:
        NotADirectoryError: `save_directory` is a file.
        OSError: The folder cannot be written to, or the disk is full.
    """
    target = Path(save_directory)
    if _is_aside(target):
        # The configuration of a model that is being saved in this way itself.
        with checkpoint_code(target, *parts):
            return save(str(target), **options)
    _make_folder(target)
    with _folder_aside(target) as staged:
        with _explained(target), checkpoint_code(staged, *parts):
            code = {path.name for path in staged.iterdir()}
            paths = save(str(staged), **options)
        names = _names_in(staged) if publish else []
        # Under FSDP all processes but one have nothing but the code here, though each may think it is the main one.
        if set(names) - code:
            _publish(staged, target, variant=options.get("variant"))
            if push_to_hub:
                _push(saved, target, names, options)
    return paths and [str(target / Path(path).relative_to(staged)) for path in paths]


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Name the folder in errors of a disk that is full; safetensors' own are no `OSError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise OSError(f"{target} could not be saved, and is as it was before: {error}") from error


def _is_aside(folder: Path) -> bool:
    return folder.parent.name == _ASIDE.name and folder.name.startswith(_PREFIX)


def _make_folder(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a checkpoint is saved into a folder.")
    target.mkdir(parents=True, exist_ok=True)


@contextmanager
def _folder_aside(target: Path) -> Iterator[Path]:
    """A new folder inside of `target`, on its disk, that is gone at the end."""
    try:
        with _locked(target):
            _remove_abandoned(target)
            _finish(target)
            (target / _ASIDE).mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target / _ASIDE))
            lock = _lock(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)
    finally:
        with _locked(target):
            for parent in (_ASIDE, _ASIDE.parent):
                with suppress(OSError):
                    (target / parent).rmdir()


def _remove_abandoned(target: Path) -> None:
    """Remove what dead processes have left aside; the lock of a living one cannot be had."""
    for folder in (target / _ASIDE).glob(f"{_PREFIX}*"):
        lock = _lock(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes that save into `folder` waiting. Only ever for moments in which nobody waits for them."""
    lock = _lock(folder)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, *, wait: bool = True) -> int | None:
    """Lock a folder until it is unlocked or the process dies; `None` if it is locked, or on disks without locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _names_in(staged: Path) -> list[str]:
    """The files of a folder, in the order in which they are put into their place: `config.json` last."""
    names = [path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()]
    return sorted(names, key=lambda name: (name == CONFIG_NAME, name.endswith(".json"), name))


def _is_weights(name: str, variant: str | None = None) -> bool:
    infix = rf"\.{re.escape(variant)}" if variant else ""
    pattern = rf"model{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{infix}\.json"
    return re.fullmatch(pattern, name) is not None


def _publish(staged: Path, target: Path, *, variant: str | None) -> None:
    """Move the files of `staged` into their place."""
    if variant is None:
        _name_pending(staged)
    names = _names_in(staged)
    for name in names:
        _sync(staged / name)
    with _locked(target):
        _finish(target)
        # They are those of the files that are about to be replaced.
        (target / CHECKSUMS).unlink(missing_ok=True)
        if variant is not None:
            _remove_variant(target, variant, keep=names)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name == CONFIG_NAME:
                # The weights that it names have to be on the disk before it.
                _sync(target)
            os.replace(staged / name, target / name)
        _sync(target)
        _finish(target)


def _name_pending(staged: Path) -> None:
    """Give weights that come with a configuration names of their own, and the configuration the key that says so."""
    weights = [path for path in staged.iterdir() if _is_weights(path.name)]
    config = staged / CONFIG_NAME
    if not weights or not config.is_file():
        return
    for path in weights:
        path.rename(staged / f"{_PENDING}{path.name}")
    pointer, index = f"{_PENDING}{SAFE_WEIGHTS_NAME}", staged / f"{_PENDING}{SAFE_WEIGHTS_INDEX_NAME}"
    if index.is_file():
        pointer = index.name
        _rename_in_index(index, index, lambda name: f"{_PENDING}{name}")
    shutil.copyfile(config, staged / f"{_PENDING}{CONFIG_NAME}")
    _write_json(config, _read_json(config) | {_POINTER: pointer})


def _finish(target: Path) -> None:
    """Give pending weights their usual names if `config.json` names them; remove them if it does not.

    It can be interrupted and repeated: until its last step the configuration names files that stay as they are.
    """
    pending = [path for path in target.glob(f"{_PENDING}*") if _is_pending(path.name)]
    if pending and str(_read_json(target / CONFIG_NAME).get(_POINTER)).startswith(_PENDING):
        for path in [*target.iterdir()]:
            if _is_weights(path.name):
                path.unlink()
        for path in pending:
            _give_name(path, target / path.name.removeprefix(_PENDING))
        _sync(target)
        os.replace(target / f"{_PENDING}{CONFIG_NAME}", target / CONFIG_NAME)
        _sync(target)
    for path in pending:
        path.unlink(missing_ok=True)


def _is_pending(name: str) -> bool:
    name = name.removeprefix(_PENDING)
    return name == CONFIG_NAME or _is_weights(name)


def _give_name(path: Path, place: Path) -> None:
    """Give a pending file its usual name beside the one it has."""
    if path.name.endswith(SAFE_WEIGHTS_INDEX_NAME):
        _rename_in_index(path, place, lambda name: name.removeprefix(_PENDING))
    elif path.name.endswith(".safetensors"):
        try:
            os.link(path, place)
        except OSError:
            # Some disks have no hard links.
            shutil.copyfile(path, place)
            _sync(place)


def _rename_in_index(path: Path, place: Path, rename: Callable[[str], str]) -> None:
    index = _read_json(path)
    index["weight_map"] = {key: rename(file) for key, file in index["weight_map"].items()}
    _write_json(place, index)
    _sync(place)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is none that can be read."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write JSON in the form that transformers gives it."""
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _remove_variant(target: Path, variant: str, *, keep: list[str]) -> None:
    """Remove a variant's weights that will not be replaced, and its index before any: no load mixes old and new."""
    stale = [path for path in target.iterdir() if _is_weights(path.name, variant)]
    for path in sorted(stale, key=lambda path: path.suffix):
        if path.suffix == ".json" or path.name not in keep:
            path.unlink()


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, where the system can tell."""
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _push(saved: Any, target: Path, names: list[str], options: dict[str, Any]) -> None:
    """Upload what was saved, as `push_to_hub` of transformers does, but from the folder and without saving again."""

    def copy_files(folder: str, **_: Any) -> None:
        for name in names:
            place = Path(folder, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target / name, place)

    stand_in = copy(saved)
    stand_in.save_pretrained = copy_files
    hub_options = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    stand_in.push_to_hub(options.get("repo_id") or target.resolve().name, **hub_options)


__all__ = ["AtomicSavingMixin", "save_atomically"]
