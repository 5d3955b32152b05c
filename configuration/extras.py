"""Modules that an extra of setup.cfg brings: `require` gives one, or says which extra has it."""

import importlib
from typing import Any


def require(module: str, purpose: str, *, extra: str) -> Any:
    """A module that need not be installed.

    Raises:
        ImportError: It is not; the message says what for, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs {package}: pip install 'deepseek-ocr-vision[{extra}]'") from error
