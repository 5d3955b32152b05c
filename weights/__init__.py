"""Weights in and out: released checkpoints, transformers' Unlimited-OCR, live encoders. Never staged to the Hub.

`loading` gives an encoder and its image processor, `reading` and `live_encoder` make a model, `writing` puts its
weights back. Below them: `checkpoints` and `hub` open what is on this machine and elsewhere, `repository` knows the
Hub's ids and errors, `names` matches tensors, `sizes` tells how large an encoder is, and `safetensors_files` reads
safetensors.
"""

from .live_encoder import load_live_encoder
from .loading import load_encoder
from .reading import check_checkpoint, check_files, load_deepseek_ocr
from .repository import check_repository_id
from .sizes import image_size_of
from .writing import WriteReport, atomic_write, write_deepseek_ocr


__all__ = [
    "WriteReport",
    "atomic_write",
    "check_checkpoint",
    "check_files",
    "check_repository_id",
    "image_size_of",
    "load_deepseek_ocr",
    "load_encoder",
    "load_live_encoder",
    "write_deepseek_ocr",
]
