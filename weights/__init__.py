"""Weights in and out: released checkpoints, transformers' Unlimited-OCR, live encoders. Never staged to the Hub.

`loading` gives an encoder and its image processor, `reading` and `live_encoder` make a model, `other_encoders` one out
of SAM and CLIP or of GOT-OCR2, `writing` puts its weights back, `verifying` says whether a checkpoint is sound. Below
them: `before_loading` checks what transformers is about to load, `checkpoints` and `hub` open what is on this machine
and elsewhere, `repository` knows the Hub's ids and errors, `names` matches tensors, `sizes` tells how large an encoder
is, and `safetensors_files` reads safetensors.
"""

from deepseek_ocr_vision.saving.checksums import verify_loaded
from deepseek_ocr_vision.saving.staging import atomic_write

from .before_loading import check_before_loading
from .checkpoints import compare_checksums
from .live_encoder import load_live_encoder
from .loading import default_image_processor, is_encoder, load_encoder
from .reading import load_deepseek_ocr
from .repository import check_repository_id
from .sizes import image_size_of
from .verifying import check_checkpoint
from .writing import WriteReport, write_deepseek_ocr


__all__ = [
    "WriteReport",
    "atomic_write",
    "check_before_loading",
    "check_checkpoint",
    "check_repository_id",
    "compare_checksums",
    "default_image_processor",
    "image_size_of",
    "is_encoder",
    "load_deepseek_ocr",
    "load_encoder",
    "load_live_encoder",
    "verify_loaded",
    "write_deepseek_ocr",
]
