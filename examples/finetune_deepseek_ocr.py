"""Fine-tune the whole DeepSeek-OCR on your own pages, vision included, and write it back for who serves it.

    python examples/finetune_deepseek_ocr.py --model deepseek-ai/DeepSeek-OCR --data my_pages \\
        --output_dir outputs/mine --lora sam clip attention shared_experts --max_steps 200

`my_pages` is a folder of images with a `metadata.jsonl`: `{"file_name": "1.png", "text": "what is on it"}`. A tenth of
them is held out, and the character error rate on these is measured before and after. Started again, the same command
goes on where it was. At the end `outputs/mine/released` is the model in the layout of `--model`, and
`outputs/mine/result.json` says what came of it. It needs transformers 5.21 or newer; `--lora` needs peft.
"""

import json
import logging
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from report import character_error_rate
from transformers import HfArgumentParser, Trainer, TrainingArguments

from deepseek_ocr_vision import ImageTextCollator
from deepseek_ocr_vision.composites import DeepSeekOCRForConditionalGeneration, DeepSeekOCRProcessor
from deepseek_ocr_vision.composites.read_pages import load_reader, prompt_of, read_page
from deepseek_ocr_vision.configuration import MODES
from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import list_some
from deepseek_ocr_vision.training import LANGUAGE_MODEL_LORA_TARGETS, LORA_TARGETS, resume


logger = logging.getLogger(__name__)

TARGETS = LORA_TARGETS | LANGUAGE_MODEL_LORA_TARGETS


@dataclass
class WholeModelArguments:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "The released checkpoint: Hub id or folder."})
    data: str = field(metadata={"help": "Folder of images with a metadata.jsonl."})
    mode: str = field(default="base", metadata={"help": "Resolution of pages.", "choices": list(MODES)})
    prompt: str = field(default="text", metadata={"help": "A released prompt's name, or one in full with <image>."})
    text_column: str = field(default="text", metadata={"help": "What a page's text is called in metadata.jsonl."})
    held_out_fraction: float = field(default=0.1, metadata={"help": "Part of the pages that is only read."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Layer groups not to train, such as `language_model` or `sam`."}
    )
    lora: list[str] = field(
        default_factory=list, metadata={"help": f"Train adapters of these parts alone: {', '.join(TARGETS)}."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    dtype: str = field(default="bfloat16", metadata={"help": "What weights are loaded in."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Of a page that is read."})


@dataclass
class FinetuneArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with defaults for a pretrained model, and images in the batches."""

    output_dir: str = field(default="outputs/deepseek_ocr", metadata={"help": "Where everything goes."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Pages at once on a device."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Batches of a step."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Save memory for time."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two losses."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: the collator needs the images."})
    report_to: str = field(default="none", metadata={"help": "Where Trainer reports to, such as `tensorboard`."})


class Pages(torch.utils.data.Dataset):
    """Rows of an image folder as samples of the collator."""

    def __init__(self, rows: datasets.Dataset, prompt: str, text_column: str):
        self.rows, self.prompt, self.text_column = rows, prompt, text_column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"image": row["image"], "prompt": self.prompt, "answer": row[self.text_column]}


def load_pages(arguments: WholeModelArguments, *, seed: int) -> dict[str, Pages]:
    """The pages to train on and those held out."""
    rows = datasets.load_dataset("imagefolder", data_dir=arguments.data, split="train")
    if arguments.text_column not in rows.column_names:
        raise ValueError(f"--data {arguments.data} has the columns {rows.column_names}, no {arguments.text_column!r}.")
    texts = rows[arguments.text_column]
    wrong = [number for number, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
    if wrong:
        names = [f"row {number}, {texts[number]!r}" for number in wrong]
        raise ValueError(f"--data {arguments.data} has no text under {arguments.text_column!r} in {list_some(names)}.")
    splits = rows.train_test_split(arguments.held_out_fraction, seed=seed)
    prompt = prompt_of(arguments.prompt)
    return {name: Pages(part, prompt, arguments.text_column) for name, part in splits.items()}


def error_rate(model: Any, processor: DeepSeekOCRProcessor, pages: Pages, arguments: WholeModelArguments) -> float:
    """The character error rate of what the model reads on pages."""
    model.eval()
    read, written = [], []
    for page in pages:
        choices = {"prompt": page["prompt"], "max_new_tokens": arguments.max_new_tokens}
        read.append(read_page(model, processor, page["image"], **choices))
        written.append(page["answer"])
    return character_error_rate(read, written)


def with_adapters(model: DeepSeekOCRForConditionalGeneration, arguments: WholeModelArguments) -> Any:
    """The model as it is, or frozen with adapters in the parts that were asked for."""
    unknown = [part for part in arguments.lora if part not in TARGETS]
    if unknown:
        raise ValueError(f"--lora has {unknown}; it has to be of {list(TARGETS)}.")
    if not arguments.lora:
        return model.freeze(*arguments.freeze) if arguments.freeze else model
    import peft

    targets = [name for part in arguments.lora for name in TARGETS[part]]
    config = peft.LoraConfig(r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank, target_modules=targets)
    return peft.get_peft_model(model, config)


def main(argv: list[str] | None = None) -> None:
    """Read, train, read again, write back."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = HfArgumentParser(
        (WholeModelArguments, FinetuneArguments), description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    whole, arguments = parser.parse_args_into_dataclasses(argv)
    output = Path(arguments.output_dir)
    released = output / "released"
    if released.exists():
        raise FileExistsError(f"{released} is there already: this run is finished. Choose another --output_dir.")
    pages = load_pages(whole, seed=arguments.seed)
    model, processor = load_reader(whole.model, mode=whole.mode, dtype=whole.dtype, device=arguments.device)
    before_file = output / "before.json"
    if not before_file.is_file():
        output.mkdir(parents=True, exist_ok=True)
        before_file.write_text(json.dumps(error_rate(model, processor, pages["test"], whole)))
    trained = with_adapters(model, whole)
    trainer = Trainer(trained, arguments, train_dataset=pages["train"], data_collator=ImageTextCollator(processor))
    state = resume(trainer)
    model = trained.merge_and_unload() if whole.lora else trained
    after = error_rate(model, processor, pages["test"], whole)
    report = model.write_deepseek_ocr(whole.model, released)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    result = {"before": json.loads(before_file.read_text()), "after": after, "steps": state.global_step}
    (output / "result.json").write_text(json.dumps(result | {"losses": losses}, indent=1))
    sys.stdout.write(f"Character error rate: {result['before']:.3f} before, {after:.3f} after.\n{report}\n")


if __name__ == "__main__":
    main()
