"""Weights in: a model from a released checkpoint, on the Hub or on this machine."""

import os
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig, FeatureMode

from .checkpoints import LocalCheckpoint, compare_checksums, open_local
from .hub import open_remote
from .names import match_tensors, our_name
from .repository import repository_named
from .safetensors_files import DTYPES
from .sizes import check_layers, config_of_checkpoint, expected_shapes


Model = TypeVar("Model", bound=PreTrainedModel)

_HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def load_deepseek_ocr(
    model_class: type[Model],
    source: str | os.PathLike,
    *,
    feature_mode: FeatureMode,
    config: DeepSeekOCRVisionConfig | None = None,
    dtype: str | torch.dtype | None = None,
    verify_checksums: bool = False,
    **kwargs: Any,
) -> Model:
    """Load the encoder out of a whole checkpoint: what `DeepSeekOCRVisionModel.from_deepseek_ocr` does.

    Of a repository on the Hub only the vision tensors are fetched, 0.8 of 6.7 GB, and kept in the Hub's cache. An
    interrupted download goes on where it stopped. Every tensor has to be there, of the right shape and finite.

    Args:
        model_class: The class of the model.
        source: A Hub id such as `"deepseek-ai/DeepSeek-OCR"` or `"baidu/Unlimited-OCR"`, a folder with one or many
            safetensors files, or one such file; in the released layout or that of transformers' Unlimited-OCR.
        feature_mode: The mode, which decides the tensors that are used.
        config: The encoder, where the checkpoint is of another size than the released ones and does not say so.
        dtype: What to convert the weights to. By default they stay as they are stored, bfloat16 if released.
        verify_checksums: Whether to compare a local checkpoint with its `SHA256SUMS` first.
        kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` as transformers takes them, and
            what `from_pretrained` takes, such as `attn_implementation` or `device_map`.

    Raises:
        TypeError: `source` is no path and no Hub id.
        ValueError: The checkpoint does not fit, is corrupt, holds no safetensors, or is not what its checksums say;
            the message names the keys, or the file with the sizes expected and found.
        OSError: It is not there or cannot be fetched; the message names the file, or status and repository.
    """
    hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    repo_id = repository_named(source, argument="source")
    if verify_checksums:
        _verify_local(source, repo_id)
    checkpoint = open_local(source) if repo_id is None else open_remote(repo_id, **hub_options)
    config = config_of_checkpoint(checkpoint.config, feature_mode) if config is None else config
    check_layers(config, [our_name(name).key for name in checkpoint.shapes])
    # Everything is matched before a byte of the weights is fetched or read.
    match_tensors(checkpoint.shapes, expected_shapes(model_class, config))
    local = checkpoint.local()
    sources = match_tensors(local.shapes, expected_shapes(model_class, config))
    dtype = chosen_dtype(dtype) or widest_dtype(local, sources)
    weights = {key: tensor.to(dtype) for key, tensor in local.read(sources)}
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, strict=True, **kwargs)


def _verify_local(source: str | os.PathLike, repo_id: str | None) -> None:
    if repo_id is not None:
        raise ValueError(
            f"`verify_checksums` is true, but of {repo_id} only the encoder's part is fetched, not the whole files "
            "that were summed."
        )
    compare_checksums(source, required=True)


def chosen_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """What a caller asks for by `dtype`; `None` for as it is stored.

    Raises:
        ValueError: Weights do not have such a dtype.
    """
    if dtype is None or dtype == "auto":
        return None
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        allowed = ", ".join(str(allowed) for allowed in DTYPES.values())
        raise ValueError(f"`dtype` is {dtype!r}; it has to be one of {allowed}, their names, 'auto' or None.")
    return chosen


def widest_dtype(checkpoint: LocalCheckpoint, sources: dict[str, list[str]]) -> torch.dtype:
    """One dtype that holds all of the checkpoint's weights exactly."""
    names = {checkpoint.tensors[name].dtype for names in sources.values() for name in names}
    dtypes = [DTYPES[name] for name in names if name in DTYPES]
    widest = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
