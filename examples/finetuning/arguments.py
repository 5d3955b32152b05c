"""What can be asked for on the command line."""

import logging
import os
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

from language_models import HELP, find_language_model
from training_defaults import SmallModelArguments
from transformers import HfArgumentParser


logger = logging.getLogger("finetune")

TRAINED, FROZEN = "trained", "frozen"


@dataclass
class PageArguments:
    """The pages."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Your own pages: a folder of images with a metadata.jsonl, one "
            '{"file_name": "page.png", "text": "what it says"} a line, or with a CSV that has these columns; what '
            "`save_to_disk` wrote; or whatever else `datasets.load_dataset` opens. Without it, pages of handwritten "
            "digits are drawn."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column of --data that holds the image."})
    text_column: str = field(default="text", metadata={"help": "Column of --data that holds the text on it."})
    held_out_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Part of --data to hold out where it has no split named `validation` or `test`: neither as a file "
            "or folder, nor as the first folder of the images' names, nor in a column `split`."
        },
    )
    num_pages: int = field(default=32_000, metadata={"help": "Number of handwritten pages to train on."})
    num_held_out_pages: int = field(default=500, metadata={"help": "Number of handwritten pages held out."})
    page_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square, in pixels, that a page is resized to; a multiple of 64. One token stands for "
            "64 x 64 pixels. Defaults to the encoder's `image_size`; for a new one to what the text of --data needs, "
            "and to 128 for handwritten digits."
        },
    )


@dataclass
class ModelArguments:
    """The model."""

    encoder: str | None = field(
        default=None,
        metadata={"help": "Checkpoint of the encoder to start from (folder or Hub id). Without it, a small new one."},
    )
    language_model: str | None = field(default=None, metadata={"help": HELP})
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Layer groups of the encoder that are not trained, such as `sam`, `sam.blocks`, `sam.blocks.0`, "
            "`clip`, `clip.layers.1`. An unknown name is answered with the list."
        },
    )
    compare_frozen: bool = field(
        default=True,
        metadata={"help": "Whether to train a second time with the whole encoder frozen as it starts, to compare."},
    )
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Highest learning rate of the encoder's last layer group. Defaults to --learning_rate for a new "
            "encoder, and to a twentieth of it for --encoder."
        },
    )
    layer_decay: float = field(
        default=0.9,
        metadata={"help": "Factor from the rate of each layer group of --encoder to the one before it."},
    )
    language_model_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Highest learning rate of the language model. Defaults to --learning_rate for a new one, and to a "
            "fiftieth of it for --language_model."
        },
    )


@dataclass
class FinetuneArguments(SmallModelArguments):
    """How to train, and where to."""

    output_dir: str = field(default="outputs/finetune", metadata={"help": "Folder for everything this script makes."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start anew in an --output_dir that this script used before: delete what it left there."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "`true`: go on in --output_dir where a run was cut off, from its newest complete checkpoint, and "
            "keep what is finished. A checkpoint's folder, the last one of its run: go on from there. Losses are "
            "those of a run that was never cut off. Without it and without --overwrite, an --output_dir already in "
            "use is refused."
        },
    )
    max_steps: int = field(
        default=-1,
        metadata={
            "help": "Optimizer steps of each run; with -1, --num_train_epochs counts. Where neither is given: 1100 "
            "for handwritten digits, and for --data 3 epochs, or as many more as make 1000 steps."
        },
    )
    num_train_epochs: float = field(
        default=0.0, metadata={"help": "How often each page is trained on; 0 leaves it to --max_steps."}
    )
    per_device_train_batch_size: int = field(
        default=0,
        metadata={"help": "Pages a step and device; 0 takes 32 small pages, and fewer the larger they are."},
    )
    per_device_eval_batch_size: int = field(
        default=0, metadata={"help": "Pages read at once; 0 takes three times as many as are trained on."}
    )
    logging_steps: float = field(
        default=0.02,
        metadata={"help": "Log the loss, a mean over as many steps; below 1, that share of all steps."},
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to compute the loss on held-out pages."})
    eval_steps: float | None = field(
        default=0.2, metadata={"help": "Compute that loss every so many steps; below 1, that share of all."}
    )
    save_steps: float = field(
        default=0.2, metadata={"help": "Write a checkpoint every so many steps; below 1, that share of all."}
    )
    seed: int = field(default=0, metadata={"help": "Decides pages, splits, new weights and the pages' order."})
    ddp_timeout: int = field(
        default=6 * 3600, metadata={"help": "Seconds that a process waits for another, as while data is checked."}
    )


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the description as they are."""


def parse_arguments(
    argv: list[str] | None = None, *, description: str = ""
) -> tuple[PageArguments, ModelArguments, FinetuneArguments]:
    """Read the command line, and refuse what cannot be meant.

    Raises:
        ValueError: A value is out of its range, or what is read lies where is written.
    """
    kinds = (PageArguments, ModelArguments, FinetuneArguments)
    usage = "%(prog)s [options]"
    parser = HfArgumentParser(kinds, description=description, usage=usage, formatter_class=HelpFormatter)
    page_arguments, model_arguments, arguments = parser.parse_args_into_dataclasses(argv)
    output = Path(arguments.output_dir)
    arguments.resume_from_checkpoint = what_to_resume(arguments.resume_from_checkpoint, output)
    read = {"data": page_arguments.data, "encoder": model_arguments.encoder}
    for name, path in (read | {"language_model": model_arguments.language_model}).items():
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"--{name} {path} lies in --output_dir {output}, which is written to.")
    if not 0 < page_arguments.held_out_fraction < 1:
        raise ValueError(f"--held_out_fraction is {page_arguments.held_out_fraction}; it has to be between 0 and 1.")
    refuse_what_cannot_be_saved(arguments)
    model_arguments.language_model = find_language_model(model_arguments.language_model)
    return page_arguments, model_arguments, arguments


def refuse_what_cannot_be_saved(arguments: FinetuneArguments) -> None:
    """Refuse settings under which a run could not go on, or could not end.

    Raises:
        ValueError: There would be no checkpoints, or they would hold no states, or no model.
    """
    if arguments.save_only_model:
        raise ValueError("--save_only_model writes checkpoints that no run can go on from; leave it out.")
    if arguments.save_strategy == "no":
        raise ValueError("--save_strategy no writes no checkpoints, and a run that is cut off is lost; leave it out.")
    if os.environ.get("FSDP_STATE_DICT_TYPE") == "SHARDED_STATE_DICT":
        raise ValueError(
            "`fsdp_state_dict_type` SHARDED_STATE_DICT makes no checkpoint a model; take FULL_STATE_DICT."
        )


def what_to_resume(requested: str | None, output: Path) -> str | None:
    """Read `--resume_from_checkpoint`: nothing, `"true"`, or the folder of a checkpoint of one of the runs.

    Raises:
        ValueError: It is neither.
    """
    if requested is None or requested.lower() == "false":
        return None
    if requested.lower() in ("true", "auto"):
        return "true"
    if not any(names_checkpoint_of(output / name, requested) for name in (TRAINED, FROZEN)):
        raise ValueError(
            f"--resume_from_checkpoint is {requested!r}; it has to be `true` or the folder of a checkpoint in "
            f"{output / TRAINED} or {output / FROZEN}."
        )
    return requested


def names_checkpoint_of(run_folder: Path, requested: str | None) -> bool:
    """Whether `--resume_from_checkpoint` is the folder of a checkpoint of this run."""
    return requested is not None and Path(requested).resolve().parent == run_folder.resolve()
