"""Optical memory: a language model gets a text as images of pages instead of tokens, and reads it from them.

    python examples/optical_memory.py      # topics of Python's own documentation, a small encoder, a small Llama
    python examples/optical_memory.py --help

A passage is drawn on pages, the encoder makes a few tokens of each page, the projector brings them to the language
model, and the language model writes what stands there. The encoder stays as it is; trained are the projector and, if
it is new and knows nothing, the language model. A second run from the same start trains the encoder too. One of four
passages in training comes without pages, so that one and the same model can be measured with and without them. What it
leaves in `--output_dir`:

    report.md           what was measured on passages of texts that were held out, and the command that measured it
    loss.png            losses on held-out passages, with and without their pages
    pages.png           held-out pages, and beside each what was read from it, mistakes marked
    frozen/, trained/   the runs: checkpoints, `result.json`, in composite/ the model with its processor, and in
                        encoder/ the encoder alone, which another run can start from

Interrupted and started again, it goes on where it was. With a language model that knows English, which stays as it is:

    python examples/optical_memory.py --language_model smollm2 --train_encoder true --encoder outputs/seeing/encoder \\
        --page_size 128 --per_device_train_batch_size 16 --output_dir outputs/smollm2_memory

Your own texts, encoder and language model:

    python examples/optical_memory.py --text book.txt notes.txt --encoder deepseek-ocr-encoder/ \\
        --language_model my_llama/ --page_size 1024 --font_size 16 --margin 32 --output_dir outputs/my_memory
"""

import copy
import json
import logging
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
from files import replacing, write_text
from finetuning.arguments import HelpFormatter
from finetuning.page_view import NUM_DRAWN_PAGES, draw_predictions
from language_models import HELP, find_language_model
from matplotlib.figure import Figure
from passages import SPLITS, Passages, read_texts, split_texts, with_pages_of_another, without_pages
from report import (
    COLORS,
    Result,
    character_error_rate,
    device_name,
    duration,
    markdown_table,
    page_accuracy,
    save_figure,
)
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from training_defaults import SmallModelArguments
from transformers import (
    HfArgumentParser,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from deepseek_ocr_vision.composites import build_model, build_processor
from deepseek_ocr_vision.processing.text_pages import TextRenderer
from deepseek_ocr_vision.training.collator import NOT_TRAINED_ON, ImageTextCollator
from deepseek_ocr_vision.training.resuming import resume


logger = logging.getLogger("optical_memory")

FROZEN, TRAINED = "frozen", "trained"
RUNS = {"false": [FROZEN], "true": [TRAINED], "both": [FROZEN, TRAINED]}
WITH, WITHOUT, ANOTHERS = "with their pages", "without pages", "with the pages of another passage"
TRUNCATED = "with as many of their first text tokens"
ARGUMENTS_FILE = "arguments.json"
DECISIVE = ("seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay")


# What can be asked for


@dataclass
class TextArguments:
    """The texts and how they are drawn."""

    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Text files in UTF-8, at least two. Without them, the topics of Python's documentation."},
    )
    held_out_fraction: float = field(
        default=0.1, metadata={"help": "Part of all characters, in whole texts, that is held out."}
    )
    num_held_out_passages: int = field(default=200, metadata={"help": "Number of held-out passages to measure on."})
    pages_per_passage: int = field(default=1, metadata={"help": "Pages that a passage fills."})
    blind_fraction: float = field(
        default=0.25, metadata={"help": "Part of the passages that are trained on without their pages."}
    )
    page_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of a page in pixels, a multiple of 64. One token stands for 64 x 64 pixels. Defaults to the "
            "encoder's `image_size`, and to 128 for a new one."
        },
    )
    font: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Font file, and further ones for characters that it has not. Without it, DejaVu Sans Mono, which "
            "matplotlib brings."
        },
    )
    font_size: float = field(default=26, metadata={"help": "Pixels of an em; 26 puts 8 letters on 128 pixels."})
    margin: int = field(default=0, metadata={"help": "Pixels left blank on each side of a page."})


@dataclass
class ModelArguments:
    """The model."""

    encoder: str | None = field(
        default=None,
        metadata={"help": "Checkpoint of the encoder (folder or Hub id). Without it, a small new one."},
    )
    language_model: str | None = field(default=None, metadata={"help": HELP})
    train_encoder: Literal["false", "true", "both"] = field(
        default="both",
        metadata={"help": "Whether the encoder is trained too; `both` does it without and with, from one start."},
    )
    train_language_model: bool = field(
        default=False, metadata={"help": "Whether --language_model is trained too. A new one always is."}
    )


@dataclass
class MemoryArguments(SmallModelArguments):
    """How to train, and where to."""

    output_dir: str = field(default="outputs/optical_memory", metadata={"help": "Folder for all that this makes."})
    max_steps: int = field(default=1500, metadata={"help": "Optimizer steps of each run."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Passages a step and device."})
    per_device_eval_batch_size: int = field(default=100, metadata={"help": "Passages measured at once."})
    logging_steps: float = field(default=50, metadata={"help": "Log the loss, a mean over as many steps."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to compute the losses on held-out passages."})
    eval_steps: float | None = field(default=150, metadata={"help": "Compute those losses every so many steps."})
    save_steps: float = field(default=300, metadata={"help": "Write a checkpoint every so many steps."})
    seed: int = field(default=0, metadata={"help": "Decides passages, splits, new weights and the order."})


# Training and measuring


@dataclass
class MemoryResult(Result):
    """What one run came to.

    Attributes:
        bits_per_byte: Mean over all bytes of the held-out passages, by what the model had before it.
    """

    bits_per_byte: dict[str, float]


def run(
    name: str,
    splits: dict[str, Dataset],
    *,
    num_tokens: int,
    processor: LlavaProcessor,
    model_arguments: ModelArguments,
    arguments: MemoryArguments,
) -> MemoryResult:
    """Train one model and measure it on held-out passages; a finished run is only loaded."""
    folder = Path(arguments.output_dir) / name
    if (folder / "result.json").is_file():
        logger.info("The run with the encoder %s is finished; keeping it.", name)
        return MemoryResult.load(folder / "result.json")
    logger.info("Training with the encoder %s.", name)
    set_seed(arguments.seed)  # both runs start from the same weights
    model = build_model(processor, encoder=model_arguments.encoder, language_model=model_arguments.language_model)
    freeze(model, name, model_arguments)
    start = {key: value.clone() for key, value in model.model.vision_tower.state_dict().items()}
    collator = ImageTextCollator(processor)
    held_out = list(splits["held_out"])
    history = train(model, splits["train"], held_out, collator=collator, arguments=arguments, folder=folder)
    model.eval()
    with replacing(folder / "composite") as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    with replacing(folder / "encoder") as temporary:
        model.model.vision_tower.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)
    end = model.model.vision_tower.state_dict()
    result = MemoryResult(
        name=name,
        read=read_passages(model, held_out, processor=processor, batch_size=arguments.eval_batch_size),
        written=[sample["answer"] for sample in held_out],
        history=history,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        changed_encoder_tensors=sum(not torch.equal(end[key].cpu(), start[key]) for key in start),
        encoder_tensors=len(start),
        bits_per_byte={
            kind: bits_per_byte(model, **memory, collator=collator, batch_size=arguments.eval_batch_size)
            for kind, memory in memories(held_out, num_tokens=num_tokens).items()
        },
    )
    result.save(folder / "result.json")
    return result


def freeze(model: LlavaForConditionalGeneration, run_name: str, arguments: ModelArguments) -> None:
    """Leave to training the projector, a language model that is new, and what was asked for."""
    if run_name == FROZEN:
        model.model.vision_tower.freeze()
    if arguments.language_model and not arguments.train_language_model:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)


def train(
    model: LlavaForConditionalGeneration,
    passages: Dataset,
    held_out: list[dict],
    *,
    collator: ImageTextCollator,
    arguments: MemoryArguments,
    folder: Path,
) -> list[dict]:
    """Train with `Trainer` as it is, from the newest checkpoint in the run's folder if there is one; give its log."""
    arguments = copy.copy(arguments)
    arguments.output_dir = str(folder)
    trainer = Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=passages,
        eval_dataset={"with_pages": held_out, "without_pages": without_pages(held_out)},
        processing_class=collator.processor,
    )
    return resume(trainer).log_history


def memories(held_out: list[dict], *, num_tokens: int) -> dict[str, dict]:
    """What the model is measured with: the right pages, none, and wrong ones, which have to be worse than none.

    Last, as many tokens of text as pages have tokens: the passage's first ones, which then cost nothing, and no page.
    That is more than a language model makes of them, which would have to copy them.
    """
    blind = without_pages(held_out)
    return {
        WITH: {"samples": held_out},
        WITHOUT: {"samples": blind},
        ANOTHERS: {"samples": with_pages_of_another(held_out)},
        TRUNCATED: {"samples": blind, "num_known": num_tokens},
    }


@torch.no_grad()
def bits_per_byte(
    model: LlavaForConditionalGeneration,
    samples: list[dict],
    *,
    collator: ImageTextCollator,
    batch_size: int,
    num_known: int = 0,
) -> float:
    """What it takes on average to say the next byte of an answer to the model.

    The end of an answer is not counted, and its first `num_known` tokens cost nothing.
    """
    nats = 0.0
    end = collator.processor.tokenizer.eos_token_id
    for first in range(0, len(samples), batch_size):
        batch = {key: value.to(model.device) for key, value in collator(samples[first : first + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]  # [B, L - 1]
        labels = labels.masked_fill(labels == end, NOT_TRAINED_ON)
        rank = (labels != NOT_TRAINED_ON).cumsum(dim=1)  # of each token in its answer, from 1 on
        labels = labels.masked_fill(rank <= num_known, NOT_TRAINED_ON)
        logits = model(**batch).logits[:, :-1].float()  # [B, L - 1, V]
        nats += cross_entropy(logits.transpose(1, 2), labels, ignore_index=NOT_TRAINED_ON, reduction="sum").item()
    return nats / math.log(2) / sum(len(sample["answer"].encode()) for sample in samples)


@torch.no_grad()
def read_passages(
    model: LlavaForConditionalGeneration, samples: list[dict], *, processor: LlavaProcessor, batch_size: int
) -> list[str]:
    """Let the model write, greedily, what is on the pages of each passage."""
    longest = max(len(processor.tokenizer(sample["answer"])["input_ids"]) for sample in samples)
    read = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        inputs = processor(
            images=[image for sample in batch for image in sample["images"]],
            text=[sample["prompt"] for sample in batch],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        # A little longer than the longest passage, so that one who reads too much is caught.
        output = model.generate(**inputs, do_sample=False, max_new_tokens=longest + 8)
        read += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return read


# What it leaves


def format_table(results: list[MemoryResult]) -> str:
    """The results as Markdown, its columns aligned."""

    def row(name: str, value) -> tuple[str, ...]:
        return (name, *(value(result) for result in results))

    rows = [
        row("held-out passages", lambda r: f"encoder {r.name}"),
        *(
            row(f"bits per byte {kind}", lambda r, kind=kind: f"{r.bits_per_byte[kind]:.3f}")
            for kind in (WITH, WITHOUT, ANOTHERS, TRUNCATED)
        ),
        row("character error rate of reading", lambda r: f"{character_error_rate(r.read, r.written):.1%}"),
        row("passages read without a mistake", lambda r: f"{page_accuracy(r.read, r.written):.1%}"),
        row("parameters trained", lambda r: f"{r.trainable_parameters:,}"),
        row("encoder tensors changed", lambda r: f"{r.changed_encoder_tensors} of {r.encoder_tensors}"),
        row("training", duration),
    ]
    return markdown_table(rows)


def text_tokens(result: MemoryResult, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens of text that a held-out passage has on average."""
    lengths = [len(ids) for ids in tokenizer(result.written, add_special_tokens=False)["input_ids"]]
    return sum(lengths) / len(lengths)


def format_report(
    results: list[MemoryResult],
    splits: dict[str, Passages],
    *,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    seed: int,
) -> str:
    """`report.md`: the results, how they were measured, and how to measure them again."""
    written = results[0].written
    mean_bytes = sum(len(text.encode()) for text in written) / len(written)
    counts = {split: f"{passages.ends[-1]:,} characters" for split, passages in splits.items()}
    return f"""# Optical memory

{format_table(results)}

{len(written)} passages of held-out texts, of {mean_bytes:.1f} bytes on average; their pages are {num_tokens} tokens of
the encoder, and there are {text_tokens(results[0], tokenizer) / num_tokens:.2f} tokens of text for each of them. Bits
per byte: what it takes to tell the model the next byte, by its own probabilities. It is the same model with the pages
of the passage before it, with none, with those of another passage, and without pages where the passage's first
{num_tokens} tokens of text cost nothing: what the same room in the context holds as text. Error rate: insertions,
deletions and substitutions that turn what the model wrote, greedily, into what is on the pages, a character written.

![losses](loss.png)

![held-out pages, and what was read](pages.png)

## How it was measured

    {shlex.join(["python", *sys.argv])}

Seed {seed}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {device_name()}. Trained on
{counts["train"]}; {counts["held_out"]} held out, of whole texts whose paragraphs are in no text that was trained on.
"""


def draw_losses(results: list[MemoryResult], path: Path) -> None:
    """Draw the losses on held-out passages over the steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for result, color in zip(results, COLORS, strict=False):
        for kind, style in (("with_pages", "o-"), ("without_pages", "o--")):
            steps, losses = result.curve(f"eval_{kind}_loss")
            label = f"encoder {result.name}, {kind.replace('_', ' ')}"
            axes.plot(steps, np.array(losses) / math.log(2), style, color=color, ms=3, label=label)
    axes.set(xlabel="step", ylabel="bits a token of held-out passages", ylim=(0, None))
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


# From the command line


def parse_arguments(argv: list[str] | None = None) -> tuple[TextArguments, ModelArguments, MemoryArguments]:
    """Read the command line."""
    kinds = (TextArguments, ModelArguments, MemoryArguments)
    parser = HfArgumentParser(kinds, description=__doc__, usage="%(prog)s [options]", formatter_class=HelpFormatter)
    text_arguments, model_arguments, arguments = parser.parse_args_into_dataclasses(argv)
    for name in ("num_held_out_passages", "pages_per_passage"):
        if getattr(text_arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(text_arguments, name)}; it has to be at least 1.")
    if not 0 < text_arguments.blind_fraction < 1:
        raise ValueError(
            f"--blind_fraction is {text_arguments.blind_fraction}; it has to be between 0 and 1: a model that always "
            "or never has pages in training says nothing about what it does without or with them."
        )
    if arguments.max_steps < 1:
        raise ValueError(f"--max_steps is {arguments.max_steps}; it has to be at least 1.")
    model_arguments.language_model = find_language_model(model_arguments.language_model)
    return text_arguments, model_arguments, arguments


def claim_output_folder(output: Path, asked: dict) -> None:
    """Make sure that nothing is mixed up: an output folder is new, or goes on with the arguments that it began with.

    Raises:
        FileExistsError: There is something else in it, or a run with other arguments.
    """
    marker = output / ARGUMENTS_FILE
    if not marker.is_file():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(
                f"{output} holds something that this script did not make; choose another --output_dir."
            )
        write_text(marker, json.dumps(asked, indent=1))
        return
    before = json.loads(marker.read_text("utf-8"))
    differing = [
        f"--{name} is {asked[name]!r} and was {before.get(name)!r}"
        for name in asked
        if asked[name] != before.get(name)
    ]
    if differing:
        raise FileExistsError(
            f"{output} has a run with other arguments: {'; '.join(differing)}. Choose another --output_dir."
        )


def build_passages(
    texts: dict[str, list[str]], arguments: TextArguments, *, page_size: int, num_training_passages: int, seed: int
) -> dict[str, Passages]:
    """The passages to train on and the passages held out."""
    font = arguments.font or str(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"))
    renderer = TextRenderer(size=page_size, font=font, font_size=arguments.font_size, margin=arguments.margin)
    numbers = {"train": num_training_passages, "held_out": arguments.num_held_out_passages}
    return {
        split: Passages(
            texts[split],
            renderer=renderer,
            num_passages=numbers[split],
            pages_per_passage=arguments.pages_per_passage,
            seed=seed,
            split=split,
            blind_fraction=arguments.blind_fraction if split == "train" else 0.0,
        )
        for split in SPLITS
    }


def main(argv: list[str] | None = None) -> None:
    """Train with the encoder frozen and trained, measure, save, report."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    text_arguments, model_arguments, arguments = parse_arguments(argv)
    output = Path(arguments.output_dir)
    chosen = arguments.to_dict()
    asked = asdict(text_arguments) | asdict(model_arguments) | {name: chosen[name] for name in DECISIVE}
    processor = build_processor(
        encoder=model_arguments.encoder,
        language_model=model_arguments.language_model,
        page_size=text_arguments.page_size,
    )
    image_processor = processor.image_processor
    page_size = image_processor.size["height"]
    texts = split_texts(
        read_texts(text_arguments.text), held_out_fraction=text_arguments.held_out_fraction, seed=arguments.seed
    )
    splits = build_passages(
        texts,
        text_arguments,
        page_size=page_size,
        num_training_passages=arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps,
        seed=arguments.seed,
    )
    claim_output_folder(output, asked)

    num_tokens = text_arguments.pages_per_passage * image_processor.num_image_tokens(page_size, page_size)
    parts = {"processor": processor, "model_arguments": model_arguments, "arguments": arguments}
    results = [run(name, splits, num_tokens=num_tokens, **parts) for name in RUNS[model_arguments.train_encoder]]
    draw_losses(results, output / "loss.png")
    first_pages = [
        {"image": sample["images"][0].convert("RGB")} for sample in islice(splits["held_out"], NUM_DRAWN_PAGES)
    ]
    draw_predictions(results[-1], first_pages, output / "pages.png")
    facts = {"tokenizer": processor.tokenizer, "num_tokens": num_tokens, "seed": arguments.seed}
    write_text(output / "report.md", format_report(results, splits, **facts))
    sys.stdout.write(f"\n{format_table(results)}\n\nEverything is in {output}; see report.md there.\n")


if __name__ == "__main__":
    main()
