"""Saves that an interruption cannot break: what was there before still loads, or what is saved does, bit for bit.

transformers writes into the folder itself, file by file. Killed on the way, or on a full disk, it leaves weights that
are cut, or those of one model under the configuration of another. Here everything is written to a staging folder
first. Then the new weights are moved to a pending folder, and `config.json` is replaced, by one rename, by one that
names them there, by transformers' own key `transformers_weights`: whoever loads the folder reads the old checkpoint
until then and the new one from then on. Last, the weights get their usual names. Where that was interrupted, the next
save into the folder finishes it first.

Staging and pending folders lie in `.cache/huggingface` of the folder: on its disk, and where huggingface_hub never
uploads from.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .code import stage_code
from .saving_deepseek_ocr_vision import CHECKSUMS
from .staging import PREFIX, locked, staging_folder


PENDING = ".cache/huggingface/deepseek_ocr_vision-pending"
"""Where weights are from the moment in which `config.json` names them to the one in which they get their names."""

_STAGING_PLACE = Path(PENDING).parent
_POINTER = "transformers_weights"
_HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def save_atomically(
    saved: Any, save: Callable, save_directory: str | os.PathLike, *, with_code: bool, options: dict[str, Any]
) -> list[str] | None:
    """Save a model, a configuration or a processor so that an interruption at any point is harmless.

    There are two exceptions: the weights of a `variant` are replaced file by file, and an interruption can leave a
    variant of several files that does not load; and code files of two versions of this package can be left side by
    side. What all processes write together, with `distributed_checkpoint`, goes straight into the folder. The disk has
    to hold the old weights and the new ones at once.

    Args:
        saved: What is saved.
        save: transformers' own `save_pretrained` of it.
        save_directory: The folder.
        with_code: Whether to put the package's code beside it.
        options: What `save` takes. `is_main_process` says whether this process is the one that writes, while others
            only take part in gathering the weights; `push_to_hub`, whether to upload the files once they are in place.

    Returns:
        What `save` returns: `None`, or the paths of files.
    """
    target = Path(save_directory)
    is_staging = target.parent.name == _STAGING_PLACE.name and target.name.startswith(PREFIX)
    if is_staging or options.get("distributed_checkpoint"):
        # In a staging folder it is the configuration of a model that is being saved in this way itself.
        if with_code:
            stage_code(target)
        (target / CHECKSUMS).unlink(missing_ok=True)
        return save(str(target), **options)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a checkpoint is saved into a folder.")
    target.mkdir(parents=True, exist_ok=True)
    push_to_hub, options = options.get("push_to_hub"), options | {"push_to_hub": False}
    with _staging_folder_in(target) as staged:
        with _naming_the_folder(target):
            code = {path.name for path in stage_code(staged)} if with_code else set()
            paths = save(str(staged), **options)
        names = _names_in(staged) if options.get("is_main_process", True) else []
        # Under FSDP all processes but one have nothing but the code here, though each may think it is the main one.
        if set(names) - code:
            _publish(staged, target, variant=options.get("variant"))
            if push_to_hub:
                _push(saved, target, names=names, options=options)
    return paths and [str(target / Path(path).relative_to(staged)) for path in paths]


@contextmanager
def _naming_the_folder(target: Path) -> Iterator[None]:
    """Name the folder in errors of a disk that is full; safetensors' own are no `OSError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise OSError(f"{target} could not be saved, and is as it was before: {error}") from error


@contextmanager
def _staging_folder_in(target: Path) -> Iterator[Path]:
    """A staging folder below `target`. An interrupted save is finished first; folders that are empty go at the end."""
    try:
        with ExitStack() as stack:
            with locked(target):
                _finish(target)
                (target / _STAGING_PLACE).mkdir(parents=True, exist_ok=True)
                folder = stack.enter_context(staging_folder(target / _STAGING_PLACE))
            yield folder
    finally:
        with locked(target):
            for parent in (_STAGING_PLACE, _STAGING_PLACE.parent):
                with suppress(OSError):
                    (target / parent).rmdir()


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
        _make_pending(staged)
    names = _names_in(staged)
    for name in names:
        _sync(staged / name)
    with locked(target):
        _finish(target)
        # They are the sums of the files that are about to be replaced.
        (target / CHECKSUMS).unlink(missing_ok=True)
        if variant is not None:
            _remove_variant(target, variant, keep=names)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name == CONFIG_NAME:
                # The weights that it names have to be on the disk before it.
                _sync_folders(target)
            os.replace(staged / name, target / name)
        _sync_folders(target)
        _finish(target)


def _make_pending(staged: Path) -> None:
    """Move weights that come with a configuration to the pending folder, and let the configuration name them there."""
    weights = [path for path in staged.iterdir() if _is_weights(path.name)]
    config = staged / CONFIG_NAME
    if not weights or not config.is_file():
        return
    (staged / PENDING).mkdir(parents=True)
    for path in weights:
        path.rename(staged / PENDING / path.name)
    index = staged / PENDING / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        _rename_in_index(index, index, rename=lambda name: f"{PENDING}/{name}")
    shutil.copyfile(config, staged / PENDING / CONFIG_NAME)
    named = SAFE_WEIGHTS_INDEX_NAME if index.is_file() else SAFE_WEIGHTS_NAME
    _write_json(config, _read_json(config) | {_POINTER: f"{PENDING}/{named}"})


def _finish(target: Path) -> None:
    """Give pending weights their usual names if `config.json` names them; remove them if it does not.

    It can be interrupted and repeated: until its last step the configuration names files that stay as they are.
    """
    pending = target / PENDING
    if not pending.is_dir():
        return
    if str(_read_json(target / CONFIG_NAME).get(_POINTER)).startswith(PENDING):
        for path in [*target.iterdir()]:
            if _is_weights(path.name):
                path.unlink()
        for path in [*pending.iterdir()]:
            _give_name(path, target / path.name)
        _sync(target)
        os.replace(pending / CONFIG_NAME, target / CONFIG_NAME)
        _sync(target)
    shutil.rmtree(pending)


def _give_name(path: Path, place: Path) -> None:
    """Give a pending file its usual name beside the one it has."""
    if path.name == SAFE_WEIGHTS_INDEX_NAME:
        _rename_in_index(path, place, rename=lambda name: name.removeprefix(f"{PENDING}/"))
    elif path.name.endswith(".safetensors"):
        try:
            os.link(path, place)
        except OSError:
            # Some disks have no hard links.
            shutil.copyfile(path, place)
            _sync(place)


def _rename_in_index(path: Path, place: Path, *, rename: Callable[[str], str]) -> None:
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


def _sync_folders(target: Path) -> None:
    for folder in (target / PENDING, target):
        if folder.is_dir():
            _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, where the system can tell."""
    with suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _push(saved: Any, target: Path, *, names: list[str], options: dict[str, Any]) -> None:
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
