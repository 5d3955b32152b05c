"""Teach a DeepSeek-OCR vision encoder to read: inside transformers' own LLaVA, with transformers' own `Trainer`.

    python examples/finetune.py            # a small encoder and a small Llama learn to read handwritten digits
    python examples/finetune.py --help

It trains twice from the same start, on the same pages in the same order: once all of the model, and once with the
encoder frozen as it started, so that the difference is what the encoder learned. What it leaves in `--output_dir`:

    encoder/            the trained encoder with its image processor, for `AutoModel` and `AutoProcessor`
    composite/          the whole model with its processor, for `LlavaForConditionalGeneration` and `LlavaProcessor`
    report.md           what was measured, and the command that measured it
    loss.png            both runs' losses and learning rates
    predictions.png     held-out pages, what was read on them and what is written there
    trained/, frozen/   the two runs: checkpoints to resume from, and `result.json` once a run is finished

Your own pages, your own encoder, your own language model:

    python examples/finetune.py --data my_pages/ --encoder deepseek-ocr-encoder/ --language_model my_llama/ \\
        --freeze sam.patch_embed sam.blocks --page_size 1024 --max_steps -1 --num_train_epochs 3
"""

import copy
import json
import logging
import math
import shlex
import shutil
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from arguments import SmallModelArguments
from files import replacing, write_text
from pages import CREDIT, load_handwritten_pages, load_own_pages
from report import Result, draw_losses, draw_predictions, format_report, format_scores
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    set_seed,
)

from deepseek_ocr_vision import DeepSeekOCRVisionModel, ImageTextCollator, resume
from deepseek_ocr_vision.composites import IMAGE_TOKEN, build_model, build_processor
from deepseek_ocr_vision.encoding.threads import fit_threads


logger = logging.getLogger("finetune")

TRAINED, FROZEN = "trained", "frozen"
ARGUMENTS_FILE = "arguments.json"
PRODUCTS = (TRAINED, FROZEN, "composite", "encoder", "report.md", "loss.png", "predictions.png")
TOLERANCE = 1e-5  # standard deviations between the tokens of the trained and of the loaded encoder
NUM_REFERENCE_PAGES = 8
# Fields of `TrainingArguments` that decide what a run computes, so that a resumed run has to repeat them.
DECISIVE = (
    *("seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "dataloader_drop_last"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "logging_steps"),
    "label_smoothing_factor",
)


# What can be asked for


@dataclass
class PageArguments:
    """The pages."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Your own pages: a folder of pictures with a metadata.jsonl, one "
            '{"file_name": "page.png", "text": "what it says"} a line, or whatever `datasets.load_dataset` opens. '
            "Without it, pages of handwritten digits are drawn."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column of --data that holds the picture."})
    text_column: str = field(default="text", metadata={"help": "Column of --data that holds the text on it."})
    held_out_fraction: float = field(
        default=0.1,
        metadata={"help": "Part of --data to hold out where it has no split named `validation` or `test`."},
    )
    num_pages: int = field(default=32_000, metadata={"help": "Number of handwritten pages to train on."})
    num_held_out_pages: int = field(default=500, metadata={"help": "Number of handwritten pages held out."})
    page_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square, in pixels, that a page is resized to; a multiple of 64. One token stands for "
            "64 x 64 pixels. Defaults to the encoder's `image_size`, and to 128 for a new one."
        },
    )


@dataclass
class ModelArguments:
    """The model."""

    encoder: str | None = field(
        default=None,
        metadata={"help": "Checkpoint of the encoder to start from (folder or Hub id). Without it, a small new one."},
    )
    language_model: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of the language model to start from (folder or Hub id), with its tokenizer. Without "
            "it, a small new Llama that reads and writes bytes."
        },
    )
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
        default=1100, metadata={"help": "Optimizer steps of each run; with -1, --num_train_epochs counts."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Pages a step and device."})
    per_device_eval_batch_size: int = field(default=100, metadata={"help": "Pages read at once."})
    logging_steps: float = field(default=20, metadata={"help": "Log the loss, a mean over as many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to compute the loss on held-out pages."})
    eval_steps: float | None = field(default=220, metadata={"help": "Compute that loss every so many steps."})
    save_steps: float = field(default=220, metadata={"help": "Write a checkpoint every so many steps."})
    seed: int = field(default=0, metadata={"help": "Decides pages, splits, new weights and the pages' order."})


# Pages to batches


class Collator(ImageTextCollator):
    """Makes a batch of pages: the picture, and the text to write after it, which alone is trained on."""

    def __call__(self, pages: list[dict]) -> dict[str, torch.Tensor]:
        """Give `pixel_values` [B, 3, H, W], `input_ids`, `attention_mask` and `labels` [B, L]."""
        samples = [{"image": page["image"], "prompt": IMAGE_TOKEN, "answer": page["text"]} for page in pages]
        return super().__call__(samples)


# Training


def train(
    model: LlavaForConditionalGeneration,
    pages: dict[str, Dataset],
    *,
    processor: LlavaProcessor,
    arguments: FinetuneArguments,
    run_folder: Path,
) -> list[dict]:
    """Train with `Trainer` as it is, going on where this run was cut off, and give its log.

    Args:
        model: What to train, as it is at the start.
        pages: Pages to train on under `"train"`, and pages to evaluate on under `"held_out"`.
        processor: Makes the model's inputs.
        arguments: How to train.
        run_folder: Where checkpoints go.
    """
    requested = arguments.resume_from_checkpoint
    arguments = copy.copy(arguments)
    arguments.output_dir = str(run_folder)
    trainer = Trainer(
        model,
        arguments,
        data_collator=Collator(processor),
        train_dataset=pages["train"],
        eval_dataset=pages["held_out"],
        processing_class=processor,
    )
    return resume(trainer, checkpoint=requested if names_checkpoint_of(run_folder, requested) else None).log_history


def names_checkpoint_of(run_folder: Path, requested: str | None) -> bool:
    """Whether `--resume_from_checkpoint` is the folder of a checkpoint of this run."""
    return requested is not None and Path(requested).resolve().parent == run_folder.resolve()


# Reading


@torch.no_grad()
def read_pages(
    model: LlavaForConditionalGeneration,
    pages: Dataset,
    *,
    processor: LlavaProcessor,
    batch_size: int,
    show_progress: bool,
) -> tuple[list[str], list[str]]:
    """Let the model write, greedily, what is on each page; give what it read and what is written there."""
    model.eval()
    read, written = [], []
    starts = range(0, len(pages), batch_size)
    for start in tqdm(starts, desc="Reading held-out pages", disable=not show_progress):
        batch = [pages[index] for index in range(start, min(start + batch_size, len(pages)))]
        texts = [page["text"] for page in batch]
        longest = max(len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"])
        inputs = processor(
            images=[page["image"] for page in batch], text=[IMAGE_TOKEN] * len(batch), return_tensors="pt"
        )
        # A little longer than the longest text, so that one who reads too much is caught.
        output = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=longest + 8)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        read += processor.batch_decode(new_tokens, skip_special_tokens=True)
        written += texts
    return read, written


# Runs and what they leave


def run(
    name: str,
    pages: dict[str, Dataset],
    *,
    processor: LlavaProcessor,
    model_arguments: ModelArguments,
    arguments: FinetuneArguments,
) -> Result:
    """Train one model, let it read the held-out pages, and keep what came of it; a finished run is only loaded."""
    folder = Path(arguments.output_dir) / name
    result_file = folder / "result.json"
    if result_file.is_file() and not names_checkpoint_of(folder, arguments.resume_from_checkpoint):
        logger.info("The run with the encoder %s is finished; keeping it.", name)
        return Result.load(result_file)
    logger.info("Training with the encoder %s.", name)
    set_seed(arguments.seed)  # both runs start from the same weights
    model = build_model(processor, encoder=model_arguments.encoder, language_model=model_arguments.language_model)
    start = {key: value.clone() for key, value in model.model.vision_tower.state_dict().items()}
    freeze(model.model.vision_tower, name, model_arguments.freeze)
    fit_threads(model, num_pixels=arguments.train_batch_size * math.prod(processor.image_processor.size.values()))
    history = train(model, pages, processor=processor, arguments=arguments, run_folder=folder)
    read, written = read_pages(
        model,
        pages["held_out"],
        processor=processor,
        batch_size=arguments.eval_batch_size,
        show_progress=not arguments.disable_tqdm,
    )
    if name == TRAINED:
        save_models(model, processor, pages["held_out"], Path(arguments.output_dir))
    end = model.model.vision_tower.state_dict()
    result = Result(
        name=name,
        read=read,
        written=written,
        history=history,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        changed_encoder_tensors=sum(not torch.equal(end[key].cpu(), start[key]) for key in start),
        encoder_tensors=len(start),
    )
    result.save(result_file)
    return result


def freeze(encoder: DeepSeekOCRVisionModel, run_name: str, groups: list[str]) -> None:
    """Freeze what is not to be trained: the whole encoder in the run that compares, else the groups asked for."""
    if run_name == FROZEN:
        encoder.freeze()
    elif groups:
        encoder.freeze(*groups)


def save_models(model: LlavaForConditionalGeneration, processor: LlavaProcessor, pages: Dataset, output: Path) -> None:
    """Save the composite, the encoder alone, and what the encoder makes of a few pages."""
    with replacing(output / "composite") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    encoder = model.model.vision_tower
    with replacing(output / "encoder") as folder:
        encoder.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
    with replacing(output / TRAINED / "reference") as folder:
        save_reference(encoder, processor, pages, folder)


@torch.no_grad()
def save_reference(encoder: torch.nn.Module, processor: LlavaProcessor, pages: Dataset, folder: Path) -> None:
    """Save a few pages and the tokens [B, N, C] that the trained encoder makes of them, on the CPU and one by one."""
    folder.mkdir()
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    tokens = []
    for index in range(min(NUM_REFERENCE_PAGES, len(pages))):
        image = pages[index]["image"]
        image.save(folder / f"{index}.png")
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tokens.append(encoder(pixel_values).last_hidden_state[0])
    save_file({"tokens": torch.stack(tokens)}, folder / "tokens.safetensors")


def check_encoder(output: Path) -> dict:
    """Load `encoder/` by the Auto classes in a fresh process, and compare its tokens with the trained encoder's."""
    command = [sys.executable, str(Path(__file__).with_name("load_encoder.py")), str(output / "encoder")]
    command += ["--reference", str(output / TRAINED / "reference")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


# The output folder


def claim_output_folder(output: Path, asked: dict, *, resume: bool, overwrite: bool) -> None:
    """Make sure that nothing is lost or mixed up: an output folder is new, or resumed as it was, or overwritten.

    Raises:
        FileExistsError: It is in use, and neither was asked for; or what is in it was not made by this script.
        ValueError: It is resumed with arguments that would give other losses.
    """
    marker = output / ARGUMENTS_FILE
    found = [name for name in PRODUCTS if (output / name).exists()]
    if found and not marker.is_file():
        raise FileExistsError(f"{output} holds {found}, which this script did not make. Choose another --output_dir.")
    if found and resume:
        refuse_other_arguments(asked, json.loads(marker.read_text("utf-8")))
    elif found and overwrite:
        for name in found:
            shutil.rmtree(output / name) if (output / name).is_dir() else (output / name).unlink()
    elif found:
        raise FileExistsError(
            f"{output} is in use. Go on there with `--resume_from_checkpoint true`, start anew there with "
            "`--overwrite`, or choose another --output_dir."
        )
    for leftover in output.glob(".*.tmp-*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    write_text(marker, json.dumps(asked, indent=1))


def refuse_other_arguments(asked: dict, before: dict) -> None:
    """Refuse to resume a run with arguments that differ from those it was started with."""
    differing = [
        f"--{name} is {asked.get(name)!r} and was {before.get(name)!r}"
        for name in sorted(asked | before)
        if asked.get(name) != before.get(name)
    ]
    if differing:
        raise ValueError(
            f"A run is resumed with the arguments it was started with: {'; '.join(differing)}. For another run choose "
            "another --output_dir."
        )


def what_decides_losses(arguments: FinetuneArguments, *others) -> dict:
    """The arguments that decide what a run computes, in the form of JSON."""
    chosen = arguments.to_dict()
    decisive = {name: chosen[name] for name in DECISIVE}
    for other in others:
        decisive |= asdict(other)
    return json.loads(json.dumps(decisive))


# From the command line


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the lines of the description as they are."""


def parse_arguments(argv: list[str] | None = None) -> tuple[PageArguments, ModelArguments, FinetuneArguments]:
    """Read the command line, and refuse what cannot be meant."""
    kinds = (PageArguments, ModelArguments, FinetuneArguments)
    usage = "%(prog)s [options]"
    parser = HfArgumentParser(kinds, description=__doc__, usage=usage, formatter_class=HelpFormatter)
    page_arguments, model_arguments, arguments = parser.parse_args_into_dataclasses(argv)
    output = Path(arguments.output_dir)
    arguments.resume_from_checkpoint = what_to_resume(arguments.resume_from_checkpoint, output)
    given = {"data": page_arguments.data, "encoder": model_arguments.encoder}
    for name, path in (given | {"language_model": model_arguments.language_model}).items():
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(output.resolve()):
            raise ValueError(f"--{name} {path} lies in --output_dir {output}, which is written to.")
    if not 0 < page_arguments.held_out_fraction < 1:
        raise ValueError(f"--held_out_fraction is {page_arguments.held_out_fraction}; it has to be between 0 and 1.")
    warn_of_uneven_logs(arguments)
    return page_arguments, model_arguments, arguments


def what_to_resume(requested: str | None, output: Path) -> str | None:
    """Read `--resume_from_checkpoint`: nothing, `"true"`, or the folder of a checkpoint of one of the runs."""
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


def warn_of_uneven_logs(arguments: FinetuneArguments) -> None:
    """A loss is logged as a mean over `logging_steps`; a checkpoint between two logs cuts that mean in two."""
    if arguments.save_steps % arguments.logging_steps:
        logger.warning(
            "--save_steps %g is no multiple of --logging_steps %g: the first loss logged after a resume is a mean "
            "over fewer steps than that of a run that was never cut off.",
            arguments.save_steps,
            arguments.logging_steps,
        )


def load_pages(arguments: PageArguments, *, page_size: int, seed: int) -> dict[str, Dataset]:
    """The pages to train on and the pages held out."""
    if arguments.data is None:
        train_pages, held_out_pages = load_handwritten_pages(
            num_pages=arguments.num_pages,
            num_held_out_pages=arguments.num_held_out_pages,
            page_size=page_size,
            seed=seed,
        )
    else:
        train_pages, held_out_pages = load_own_pages(
            arguments.data,
            image_column=arguments.image_column,
            text_column=arguments.text_column,
            held_out_fraction=arguments.held_out_fraction,
            seed=seed,
        )
    return {"train": train_pages, "held_out": held_out_pages}


def main(argv: list[str] | None = None) -> None:
    """Train, compare, save, report, and check what was saved."""
    logging.basicConfig(format="%(message)s")
    for name in (logger.name, "deepseek_ocr_vision"):
        logging.getLogger(name).setLevel(logging.INFO)
    page_arguments, model_arguments, arguments = parse_arguments(argv)
    output = Path(arguments.output_dir)
    started = time.perf_counter()

    processor = build_processor(
        encoder=model_arguments.encoder,
        language_model=model_arguments.language_model,
        page_size=page_arguments.page_size,
    )
    page_size = processor.image_processor.size["height"]
    pages = load_pages(page_arguments, page_size=page_size, seed=arguments.seed)
    asked = what_decides_losses(arguments, page_arguments, model_arguments)
    may_resume = arguments.resume_from_checkpoint is not None
    is_resumed = may_resume and (output / ARGUMENTS_FILE).is_file()
    claim_output_folder(output, asked, resume=may_resume, overwrite=arguments.overwrite)

    names = [TRAINED, FROZEN] if model_arguments.compare_frozen else [TRAINED]
    results = [
        run(name, pages, processor=processor, model_arguments=model_arguments, arguments=arguments) for name in names
    ]
    draw_losses(results, output / "loss.png")
    draw_predictions(results[0], pages["held_out"], output / "predictions.png")
    logger.info("Loading %s in a fresh process.", output / "encoder")
    check = check_encoder(output)
    unit = "digit" if page_arguments.data is None else "character"
    report = format_report(
        results,
        unit=unit,
        data=page_arguments.data or CREDIT,
        check=check,
        command=shlex.join(["python", *sys.argv]),
        seed=arguments.seed,
        seconds=time.perf_counter() - started,
        is_resumed=is_resumed,
    )
    write_text(output / "report.md", report)
    sys.stdout.write(f"\n{format_scores(results, unit)}\n\nEverything is in {output}; see report.md there.\n")
    if check["difference"] > TOLERANCE:
        sys.exit(f"The loaded encoder's tokens differ from the trained one's: {check}.")


if __name__ == "__main__":
    main()
