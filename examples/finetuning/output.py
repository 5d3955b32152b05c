"""The output folder: new, resumed as it was, or overwritten; what is in it is never lost or mixed up."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from files import write_text

from finetuning.arguments import FROZEN, TRAINED, FinetuneArguments


ARGUMENTS_FILE = "arguments.json"
PRODUCTS = (TRAINED, FROZEN, "composite", "encoder", "report.md", "report.html", "loss.png", "predictions.png")
# Fields of `TrainingArguments` that decide what a run computes, so that a resumed run has to repeat them.
DECISIVE = (
    *("seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "dataloader_drop_last"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "logging_steps"),
    *("label_smoothing_factor", "load_best_model_at_end"),
)
CONTENT = "content of "
HASHED_WHOLE = 2**20  # bytes; of a larger file of weights the first and the last so many are hashed


def what_decides_losses(arguments: FinetuneArguments, *others: Any, content: dict[str, str | None]) -> dict[str, Any]:
    """What decides what a run computes, in the form of JSON: arguments, and the content of what they name."""
    chosen = arguments.to_dict()
    decisive = {name: chosen[name] for name in DECISIVE} | {"processes": arguments.world_size}
    for other in others:
        decisive |= asdict(other)
    decisive |= {f"{CONTENT}{name}": digest for name, digest in content.items()}
    return json.loads(json.dumps(decisive))


def checkpoint_content(checkpoint: str | None) -> str | None:
    """A digest of a checkpoint's files: their names, sizes, and bytes, of large ones those at both ends.

    What is on the Hub has none.
    """
    if checkpoint is None or not Path(checkpoint).is_dir():
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in Path(checkpoint).iterdir() if path.is_file()):
        size = file.stat().st_size
        digest.update(repr((file.name, size)).encode())
        with file.open("rb") as content:
            digest.update(content.read(HASHED_WHOLE))
            if size > HASHED_WHOLE:
                content.seek(max(HASHED_WHOLE, size - HASHED_WHOLE))
                digest.update(content.read())
    return digest.hexdigest()


def claim_output_folder(output: Path, asked: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Make sure that nothing is lost or mixed up: an output folder is new, or resumed as it was, or overwritten.

    Raises:
        FileExistsError: It is in use, and neither was asked for; or what is in it was not made by this script.
        ValueError: It is resumed with arguments or data that would give other losses.
    """
    refuse_unusable_folder(output, resume=resume, overwrite=overwrite)
    marker = output / ARGUMENTS_FILE
    found = [name for name in PRODUCTS if (output / name).exists()]
    if found and resume:
        refuse_other_arguments(asked, json.loads(marker.read_text("utf-8")))
    elif found:
        for name in found:
            shutil.rmtree(output / name) if (output / name).is_dir() else (output / name).unlink()
    for leftover in output.glob(".*.tmp-*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    write_text(marker, json.dumps(asked, indent=1))


def refuse_unusable_folder(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that will be refused anyway, before time is spent on looking at the data.

    Raises:
        FileExistsError: It is in use, or was not made by this script.
        OSError: It cannot be written to.
    """
    found = [name for name in PRODUCTS if (output / name).exists()]
    if found and not (output / ARGUMENTS_FILE).is_file():
        raise FileExistsError(f"{output} holds {found}, which this script did not make. Choose another --output_dir.")
    if found and not (resume or overwrite):
        raise FileExistsError(
            f"{output} is in use. Go on there with `--resume_from_checkpoint true`, start anew there with "
            "`--overwrite`, or choose another --output_dir."
        )
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--output_dir {output}: {existing} cannot be written to.")


def refuse_other_arguments(asked: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuse to resume a run with arguments or data that differ from those it was started with.

    Raises:
        ValueError: They differ; the message says how.
    """
    names = [name for name in sorted(asked | before) if asked.get(name) != before.get(name)]
    differing = [
        f"what --{name.removeprefix(CONTENT)} holds has changed since"
        if name.startswith(CONTENT)
        else f"--{name} is {asked.get(name)!r} and was {before.get(name)!r}"
        for name in names
    ]
    if differing:
        raise ValueError(
            f"A run is resumed with the arguments and data it was started with: {'; '.join(differing)}. For another "
            "run choose another --output_dir."
        )
