"""What is checked before transformers loads a checkpoint of the encoder, which believes every file it is given.

The same rules hold for a folder, a file and the Hub's cache, and for every name that transformers can be told to load:
a `variant`, a `subfolder`, an index, a file that the configuration names.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    is_peft_available,
)

from deepseek_ocr_vision.configuration.at_home import refuse_whole_model
from deepseek_ocr_vision.modeling.loading_deepseek_ocr_vision import check_loading_info

from .checkpoints import LocalCheckpoint, open_weights, read_index, require_name
from .names import raise_foreign
from .repository import HUB_OPTIONS
from .safetensors_files import DTYPES, TensorEntry, require_float
from .sizes import check_layers, expected_shapes, read_config_of


_PREFIX = "model."


def check_before_loading(
    model_class: type[PreTrainedModel],
    source: str | os.PathLike,
    *,
    strict: bool,
    allow_mismatched: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Check headers, shapes, dtypes and sizes of what `from_pretrained` is about to load; no weight is read.

    Returns:
        The options for transformers. For a Hub id they name the commit whose files have been checked.

    Raises:
        OSError: A file is missing, or cannot be fetched.
        ValueError: A file is corrupt or leads out of the folder, the weights do not fit the configuration, or there is
            an adapter in place of a model.
    """
    if _without_safetensors(options):
        return options
    _refuse_adapter(source, options)
    try:
        config = _config(model_class, source, options)
    except OSError:
        # transformers says what is wrong, or finds adapters, which have no configuration of a model.
        return options
    checkpoint, options = open_before_loading(source, getattr(config, "transformers_weights", None), options)
    if checkpoint is None:
        return options
    found = _without_prefix(checkpoint.tensors)
    check_layers(config, found)
    expected = expected_shapes(model_class, config)
    if getattr(config, "quantization_config", None) is not None:
        # Of what is quantised, the quantiser alone knows names, dtypes and shapes.
        plain = {key: entry for key, entry in found.items() if entry.dtype in DTYPES}
        info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": _mismatched(plain, expected)}
        check_loading_info(info, allow_mismatched=False)
        expected = {}
    elif strict:
        _check_tensors(model_class, found, expected, allow_mismatched=allow_mismatched)
    for key in expected:
        if key in found:
            require_float(checkpoint.folder / found[key].file, key, found[key])
    return options


def open_before_loading(
    source: str | os.PathLike, named: Any, options: dict[str, Any]
) -> tuple[LocalCheckpoint | None, dict[str, Any]]:
    """The weights that transformers will choose, by their headers, which are checked, and the options for it.

    `named` is the file that the configuration names as `transformers_weights`, if it does.

    Of a Hub id the options name the commit whose files have been checked. Where a folder has no safetensors there is
    no checkpoint: transformers says so.
    """
    path = None if _without_safetensors(options) else _weights_file(source, named, options)
    if path is None:
        return None, options
    checkpoint = open_weights(path, {})
    if not os.path.exists(source):
        options = options | {"revision": _commit_of(path, options), "force_download": False}
    return checkpoint, options


def _without_safetensors(options: dict[str, Any]) -> bool:
    return options.get("use_safetensors") is False or options.get("gguf_file") is not None


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    names = (*HUB_OPTIONS, "proxies", "subfolder")
    return {name: options[name] for name in names if options.get(name) is not None}


def _refuse_adapter(source: str | os.PathLike, options: dict[str, Any]) -> None:
    """Refuse an adapter, in place of which transformers loads the model that it names, from wherever that is.

    `AutoModel` looks that name up itself, and loads that model as any other.
    """
    is_model = os.path.isfile(source) or os.path.isfile(os.path.join(source, CONFIG_NAME))
    if is_model or not is_peft_available() or "_adapter_model_path" in (options.get("adapter_kwargs") or {}):
        return
    if find_adapter_config_file(os.fspath(source), **_hub_options(options)) is not None:
        raise ValueError(
            f"{source} holds an adapter. `AutoModel.from_pretrained` loads it with the encoder that it names, and "
            "`peft.PeftModel.from_pretrained(encoder, ...)` puts it on one that you have loaded."
        )


def _config(model_class: type[PreTrainedModel], source: str | os.PathLike, options: dict[str, Any]) -> Any:
    """The configuration that transformers will build the model by."""
    config = options.get("config")
    if isinstance(config, PreTrainedConfig):
        return config
    fields = {name: value for name, value in options.items() if name != "config"}
    place = source if config is None else config
    refuse_whole_model(place, read_config_of(place, **_hub_options(options)))
    config_class: Any = model_class.config_class
    return config_class.from_pretrained(place, return_unused_kwargs=True, **fields)[0]


def _weights_file(source: str | os.PathLike, named: Any, options: dict[str, Any]) -> Path | None:
    """The safetensors file or the index that transformers will choose, fetched if it is on the Hub.

    `None` if a folder on this machine has neither: transformers says so.
    """
    if os.path.isfile(source):
        return Path(source)
    variant = options.get("variant")
    infix = "" if variant is None else f".{variant}"
    names = [f"{infix}.".join(name.rsplit(".", 1)) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    if named is not None:
        names = [require_name(named, f"The configuration of {source}")]
    if os.path.isdir(source):
        folder = Path(source, options.get("subfolder") or "")
        return next((folder / name for name in names if (folder / name).is_file()), None)
    return _fetch(os.fspath(source), names, options)


def _fetch(repo_id: str, names: list[str], options: dict[str, Any]) -> Path:
    """The first of several files that a repository has, in the Hub's cache, and with an index the files it names."""
    hub_options = _hub_options(options)
    errors = []
    for name in names:
        try:
            path = Path(str(cached_file(repo_id, name, **hub_options)))
            break
        except OSError as error:
            errors.append(error)
    else:
        raise OSError(f"{repo_id}: {errors[0]}") from errors[0]
    if path.suffix == ".json":
        hub_options |= {"revision": _commit_of(path, options)}
        for file in dict.fromkeys(read_index(path).values()):
            cached_file(repo_id, file, **hub_options)
    return path


def _commit_of(path: Path, options: dict[str, Any]) -> str | None:
    """The commit that a file in the Hub's cache is of."""
    found = re.search(r"[/\\]snapshots[/\\]([^/\\]+)[/\\]", str(path))
    return found[1] if found else options.get("revision")


def _check_tensors(
    model_class: type[PreTrainedModel],
    found: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    *,
    allow_mismatched: bool,
) -> None:
    """Compare a checkpoint's headers with the tensors of a model."""
    ignored = [re.compile(pattern) for pattern in model_class._keys_to_ignore_on_load_unexpected or ()]
    unexpected = [key for key in found if key not in expected and not any(rule.search(key) for rule in ignored)]
    missing = [key for key in expected if key not in found]
    mismatched = _mismatched(found, expected)
    if len(missing) + len(mismatched) == len(expected):
        raise_foreign(unexpected)
    info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
    check_loading_info(info, allow_mismatched=allow_mismatched)


def _mismatched(found: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]) -> list[tuple]:
    """Key, shape found and shape expected of those that differ."""
    shapes = [(key, found[key].shape, shape) for key, shape in expected.items() if key in found]
    return [entry for entry in shapes if entry[1] != entry[2]]


def _without_prefix(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Tensors under the model's own names, the released checkpoint's prefix taken off."""
    found: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        key = name.removeprefix(_PREFIX)
        if key in found:
            raise ValueError(f"The checkpoint has {key} twice: as {key} and as {_PREFIX}{key}.")
        found[key] = entry
    return found
