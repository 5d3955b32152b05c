"""Features of pictures, stored under the content of the picture that they were computed from.

    <cache_dir>/<settings>/   a `TokenStore`, whose rows are `key` and `tokens`; its settings' hash names the folder

Other weights or other settings get a folder of their own, and nothing that was computed is ever deleted.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_ocr_vision.encoding.token_store import (
    STORED_TYPES,
    ReadFeatures,
    TokenStore,
    canonical,
    encoder_fingerprint,
    image_processor_settings,
    tokens_column,
)


LAYOUT = 1
"""Version of what is in a folder; another one recomputes everything."""


class FeatureStore(TokenStore):
    """The tokens that one encoder with one image processor gave, in a folder that many processes may fill.

    Args:
        cache_dir: Folder that holds such folders.
        settings: What the tokens depend on, in values that JSON has.
        dtype: Of the tokens, a key of `STORED_TYPES`.
        width: Channels of a token.

    Raises:
        NotADirectoryError: There is a file at `cache_dir`.
        ValueError: A file of the store is damaged; the message names it.
    """

    def __init__(self, cache_dir: str | os.PathLike, settings: dict[str, Any], *, dtype: torch.dtype, width: int):
        import datasets

        settings = {"layout": LAYOUT, "dtype": str(dtype), **settings}
        folder = Path(cache_dir).absolute() / hashlib.sha256(canonical(settings)).hexdigest()[:32]
        columns = {"key": datasets.Value("string"), "tokens": tokens_column(width, dtype)}
        super().__init__(folder, settings, columns=columns, dtype=dtype)

    def keys_of(self, rows: Mapping[str, list]) -> list[str]:
        """The keys of pictures, SHA-256 of their files."""
        return rows["key"]


__all__ = ["STORED_TYPES", "FeatureStore", "ReadFeatures", "encoder_fingerprint", "image_processor_settings"]
