"""How an encoder is published. So far its first step: staging a checkpoint in a folder that loads anywhere.

`python hub_upload.py CHECKPOINT FOLDER` reads a checkpoint, every weight accounted for, and writes what a Hub
repository of it holds: weights as safetensors, the configuration, the image processor, and the flat code that
`trust_remote_code=True` loads where this package is not installed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModel

from deepseek_ocr_vision.configuration import preset_of
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def stage(checkpoint: str | os.PathLike, folder: str | os.PathLike) -> list[Path]:
    """Write a checkpoint into a new folder as a Hub repository holds it.

    The folder appears in one step, at the end: what is interrupted leaves nothing behind under its name.

    Args:
        checkpoint: A folder with the encoder's `config.json` and weights. Its image processor is taken if it has one,
            and else the preset that belongs to its feature mode.
        folder: Where to write; it must not exist, or be empty.

    Returns:
        The files written, sorted.

    Raises:
        ValueError: The checkpoint is not one of this encoder, or its weights do not fit its configuration.
        FileExistsError: There is something at `folder` already.
        OSError: The checkpoint cannot be read, or the folder not be written.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    if not checkpoint.is_dir():
        raise NotADirectoryError(
            f"{checkpoint} is no folder; a checkpoint is a folder with a config.json and weights."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; name a new folder, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
        staged = Path(temporary) / "staged"
        model = AutoModel.from_pretrained(checkpoint, dtype="auto")
        if not isinstance(model, DeepSeekOCRVisionModel):
            raise ValueError(f"{checkpoint} holds a {type(model).__name__}, not a DeepSeekOCRVisionModel.")
        model.save_pretrained(staged)
        _image_processor_of(checkpoint, model).save_pretrained(staged)
        os.replace(staged, folder)
    return sorted(folder.iterdir())


def _image_processor_of(checkpoint: Path, model: DeepSeekOCRVisionModel) -> DeepSeekOCRVisionImageProcessor:
    if any((checkpoint / name).is_file() for name in PROCESSOR_FILES):
        return DeepSeekOCRVisionImageProcessor.from_pretrained(checkpoint)
    return DeepSeekOCRVisionImageProcessor(preset_of(model.config.feature_mode), size=model.config.image_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 1 with a message if nothing was staged."""
    parser = argparse.ArgumentParser(
        prog="hub_upload.py",
        description="Stage a checkpoint of the encoder: weights, configuration, image processor, and the code that "
        "loads them with trust_remote_code=True where this package is not installed.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder written by save_pretrained or by a Trainer")
    parser.add_argument("folder", type=Path, help="folder to write, which must not exist yet or be empty")
    options = parser.parse_args(arguments)
    try:
        files = stage(options.checkpoint, options.folder)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"Nothing was staged. {error}\n")
        return 1
    sizes = (f"{path.stat().st_size:>13,}  {path.name}\n" for path in files)
    sys.stdout.write(f"Staged {options.folder}:\n{''.join(sizes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
