"""Train a LLaVA with our encoder by TRL's `SFTTrainer`, as it is.

    pip install '.[trl]'
    python examples/train_with_trl.py --data my_pages/ --encoder outputs/finetune/encoder --language_model smollm2 \\
        --lora true --output_dir outputs/trl --num_train_epochs 1

The folder is that of `finetune.py --data`: images, and a metadata.jsonl with `file_name` and `text`. The encoder and
the projector are trained, and of the language model all, or with `--lora true` adapters; the answer alone is trained
on. All options of `SFTConfig` are taken. At the end model and processor are saved to --output_dir.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from language_models import HELP, find_language_model
from transformers import HfArgumentParser

from deepseek_ocr_vision import build_llava, save_llava


try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("This needs TRL: pip install 'deepseek-ocr-vision[trl]'") from error


@dataclass
class DataAndModel:
    """The pages and the model."""

    data: str = field(metadata={"help": "Folder of images with a metadata.jsonl."})
    encoder: str | None = field(default=None, metadata={"help": "Checkpoint of the encoder; a small new one without."})
    language_model: str | None = field(default=None, metadata={"help": HELP})
    page_size: int | None = field(default=None, metadata={"help": "Side of a page in pixels, a multiple of 64."})
    question: str = field(default="Read the page.", metadata={"help": "What stands after the image in a prompt."})
    lora: bool = field(default=False, metadata={"help": "Train adapters in the language model's attention."})


def pages_of(folder: Path, question: str) -> Dataset:
    """The pages as TRL takes them: messages in `prompt` and `completion`, and `images`."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").split("\n") if line.strip()]
    content = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    samples = [
        {
            "images": [str(folder / row["file_name"])],
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": row["text"]}]}],
        }
        for row in rows
    ]
    return Dataset.from_list(samples).cast_column("images", [Image()])


def adapters() -> Any:
    """LoRA in the language model's attention; the encoder and the projector are trained as they are."""
    from peft import LoraConfig

    return LoraConfig(
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
        modules_to_save=["vision_tower", "multi_modal_projector"],
        task_type="CAUSAL_LM",
    )


def main(argv: list[str] | None = None) -> None:
    """Train and save."""
    asked, arguments = HfArgumentParser((DataAndModel, SFTConfig)).parse_args_into_dataclasses(argv)
    arguments.max_length = None  # a prompt that is cut off would lose image tokens
    language_model = find_language_model(asked.language_model)
    model, processor = build_llava(asked.encoder, language_model=language_model, page_size=asked.page_size)
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=pages_of(Path(asked.data), asked.question),
        processing_class=processor,
        peft_config=adapters() if asked.lora else None,
    )
    trainer.train()
    trained = trainer.model.merge_and_unload() if asked.lora else trainer.model
    save_llava(trained, processor, arguments.output_dir)


if __name__ == "__main__":
    main()
