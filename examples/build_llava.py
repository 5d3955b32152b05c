"""Build a LLaVA around a DeepSeek-OCR vision encoder: a folder with model, processor and chat template.

    python examples/build_llava.py --out outputs/llava       # small and new, to try things out with
    python examples/build_llava.py --encoder outputs/finetune/encoder --language_model my_llama/ \\
        --out outputs/llava --dtype bfloat16

`deepseek_ocr_vision.build_llava` does it in Python, and its documentation says what is set and why.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
from files import replacing
from language_models import HELP, find_language_model
from transformers import LlavaForConditionalGeneration, LlavaProcessor, set_seed

from deepseek_ocr_vision import build_llava, save_llava


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what cannot be meant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="New folder for the composite.")
    parser.add_argument("--encoder", help="Checkpoint of the encoder (folder or Hub id); without it, a small new one.")
    parser.add_argument("--language_model", help=HELP)
    parser.add_argument(
        "--page_size",
        type=int,
        help="Side of the square, in pixels, that a page is resized to; a multiple of 64. Defaults to the encoder's "
        "`image_size`, and to 128 for a new one.",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="What the weights are stored as.")
    parser.add_argument("--seed", type=int, default=0, help="Decides the new weights.")
    arguments = parser.parse_args(argv)
    require_free(arguments.out)
    return arguments


def require_free(out: Path) -> None:
    """Refuse an output in use.

    Raises:
        FileExistsError: There is a file at `out`, or a folder that is not empty.
    """
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is in use; choose a new folder, or empty this one.")


def summary(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> str:
    """What was made, and how to load it."""
    size = processor.image_processor.size
    parts = {
        "encoder": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language model": model.model.language_model,
    }
    lines = [f"{name:<16} {sum(p.numel() for p in part.parameters()):>13,} parameters" for name, part in parts.items()]
    return "\n".join(
        [
            *lines,
            f"{'pages':<16} {size['height']} x {size['width']} pixels, {model.config.image_seq_length} tokens each, "
            f"{model.config.vision_config.feature_mode!r}",
            f"{'stored as':<16} {str(model.dtype).removeprefix('torch.')}",
            "",
            "Load it, after `import deepseek_ocr_vision`, by:",
            "",
            f'    model = LlavaForConditionalGeneration.from_pretrained("{out}")',
            f'    processor = LlavaProcessor.from_pretrained("{out}")',
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Build, save, and say what was made."""
    logging.basicConfig(format="%(message)s")
    arguments = parse_arguments(argv)
    set_seed(arguments.seed)
    model, processor = build_llava(
        arguments.encoder,
        language_model=find_language_model(arguments.language_model),
        page_size=arguments.page_size,
        dtype=DTYPES[arguments.dtype],
    )
    with replacing(arguments.out) as folder:
        save_llava(model, processor, folder)
    sys.stdout.write(summary(model, processor, arguments.out))


if __name__ == "__main__":
    main()
