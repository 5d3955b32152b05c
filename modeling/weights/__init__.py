"""Weights in and out: released checkpoints, transformers' Unlimited-OCR, live encoders. Never staged to the Hub.

`reading` and `live` make a model, `writing` puts its weights back. Below them: `checkpoints` and `hub` open what is on
this machine and elsewhere, `names` gives an account of the tensors, `files` reads safetensors, and `targets` is where
things are written.
"""

from .hub import check_repository_id
from .live import load_encoder
from .reading import check_checkpoint, check_files, load_deepseek_ocr
from .targets import in_one_step
from .writing import WriteReport, write_deepseek_ocr


__all__ = [
    "WriteReport",
    "check_checkpoint",
    "check_files",
    "check_repository_id",
    "in_one_step",
    "load_deepseek_ocr",
    "load_encoder",
    "write_deepseek_ocr",
]
