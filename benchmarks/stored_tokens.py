"""Measure encoding many pages, and training from stored tokens.

    python -m benchmarks.stored_tokens           # about 4 minutes on two cores
    python -m benchmarks.stored_tokens --quick   # few pages and the small encoder alone, to see that it works

The first table says whether workers keep an encoder busy that computes elsewhere, as a GPU does. Pages of text, 1216 x
1728 pixels, in a PDF of A4 and as PNG, go through `encode_pages` with the preprocessing of the released model's mode
base. The encoder only waits a given time per page and returns zeros, so the processor is free meanwhile.

The second table says what a training step costs from images and from stored tokens. Two LLaVAs with a frozen encoder
and a Llama of 0.4 M parameters are trained by `Trainer`: one with a small encoder at 128 x 128 pixels, and one with an
encoder of the full size, random weights, at 512 x 512. The last line is the rate at which stored tokens, 256 per page,
1024 wide, bfloat16, are read in random order. These times are seconds of the processor, of all threads together.
"""

import argparse
import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer_callback import PrinterCallback

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites import IMAGE_TOKEN, build_llava
from deepseek_ocr_vision.encoding import encode_pages
from deepseek_ocr_vision.processing.text_pages import text_to_pages
from deepseek_ocr_vision.training import (
    FeatureCollator,
    ImageTextCollator,
    precompute_features,
    precomputed_features,
)


Composite = tuple[LlavaForConditionalGeneration, LlavaProcessor]

NUM_TOKENS = 256
SECONDS_PER_PAGE = (0.0, 0.05, 0.2)
NUM_WORKERS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write tables to the standard output."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stored_tokens", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--quick", action="store_true", help="few pages and the small encoder alone")
    quick = parser.parse_args(arguments).quick
    with tempfile.TemporaryDirectory() as folder:
        measure_encoding(Path(folder), quick=quick)
        measure_training(Path(folder), quick=quick)


def write(*cells: str) -> None:
    """Write a row of a table at once."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


# Encoding


def measure_encoding(folder: Path, *, quick: bool) -> None:
    """Encode the same pages with encoders of several speeds and several numbers of workers."""
    image_processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="base")
    write("pages", "s per page in the encoder", "workers", "pages per second", "encoder at work")
    write(*["---"] * 5)
    for name, path in write_pages(folder, 8 if quick else 64).items():
        for seconds in SECONDS_PER_PAGE[: 2 if quick else None]:
            for num_workers in NUM_WORKERS[: 2 if quick else None]:
                summary = encode_pages(
                    [path],
                    waiting_encoder(seconds, width=2048),
                    image_processor,
                    out=folder / f"{name}-{seconds}-{num_workers}",
                    batch_size=4,
                    num_workers=num_workers,
                    show_progress=False,
                )
                rate = summary.num_new / summary.seconds
                write(name, f"{seconds}", f"{num_workers}", f"{rate:.1f}", f"{summary.busy:.0%}")


def write_pages(folder: Path, number: int) -> dict[str, Path]:
    """The same pages as a PDF and as PNG files."""
    text = "\n\n".join(topics.values())[: 8000 * number]
    pages = text_to_pages(text, size=(1728, 1216), font_size=20, replacement="?")[:number]
    if len(pages) < number:
        raise ValueError(f"the text fills {len(pages)} pages; {number} are needed")
    (folder / "images").mkdir()
    for index, page in enumerate(pages):
        page.save(folder / "images" / f"{index:03}.png")
    pages[0].save(folder / "pages.pdf", save_all=True, append_images=pages[1:], resolution=147)
    return {"PDF": folder / "pages.pdf", "PNG": folder / "images"}


class WaitingEncoder(DeepSeekOCRVisionModel):
    """An encoder that waits instead of computing; its tokens are zeros."""

    seconds: float

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        time.sleep(self.seconds * len(pixel_values))
        shape = len(pixel_values), NUM_TOKENS, self.config.hidden_size
        return BaseModelOutputWithPooling(torch.zeros(shape, dtype=self.dtype))


def waiting_encoder(seconds: float, *, width: int) -> WaitingEncoder:
    """An encoder that takes a given time per page and gives tokens of a given width."""
    config = DeepSeekOCRVisionConfig.tiny(feature_mode="projected", projection_dim=width)
    model = WaitingEncoder(config).to(torch.bfloat16)
    model.seconds = seconds
    return model


# Training


def measure_training(folder: Path, *, quick: bool) -> None:
    """Train from images and from stored tokens; then read stored tokens."""
    write("composite", "s per step from images", "s from tokens", "ratio", "s to encode a page", "losses differ by")
    write(*["---"] * 6)
    set_seed(0)
    steps = {"batch_size": 8, "num_steps": 2} if quick else {"batch_size": 32, "num_steps": 20}
    compare("small encoder, 128 x 128", build_llava(page_size=128), folder, **steps)
    if not quick:
        small, processor = build_llava(page_size=512)
        small.config.vision_config = DeepSeekOCRVisionConfig()
        full = LlavaForConditionalGeneration(small.config)
        compare("full-size encoder, 512 x 512", (full, processor), folder, batch_size=2, num_steps=5)
    rate = pages_read_per_second(folder, 100 if quick else 1000)
    write(f"reading: {rate:,.0f} pages per second, {rate * NUM_TOKENS * 1024 * 2 / 1e9:.2f} GB/s")


def compare(name: str, composite: Composite, folder: Path, *, batch_size: int, num_steps: int) -> None:
    """Train from images and from stored tokens, from the same start on the same pages."""
    model, processor = composite
    encoder = model.model.vision_tower.freeze()
    pages = random_pages(batch_size * num_steps, size=processor.image_processor.size["height"])
    start = time.process_time()
    stored = precompute_features(pages, encoder, processor, cache_dir=folder / "tokens", show_progress=False)
    per_page = (time.process_time() - start) / len(pages)
    stored = stored.remove_columns("image")
    arguments = training_arguments(folder, batch_size)
    state = copy.deepcopy(model.state_dict())
    from_images, expected = train(Trainer(model, arguments, ImageTextCollator(processor), pages))
    model.load_state_dict(state)
    with precomputed_features(model, stored):
        from_tokens, losses = train(Trainer(model, arguments, FeatureCollator(processor), stored))
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    seconds = (f"{value:.3f}" for value in (from_images, from_tokens))
    write(name, *seconds, f"{from_images / from_tokens:.1f}", f"{per_page:.3f}", f"{difference:.1e}")


def random_pages(number: int, *, size: int) -> datasets.Dataset:
    """Images of random pixels, each with a text of ten digits."""
    noise = np.random.default_rng(0).integers(0, 256, (number, size, size, 3), dtype=np.uint8)
    texts = [f"{IMAGE_TOKEN}{index:010}" for index in range(number)]
    return datasets.Dataset.from_dict({"image": [Image.fromarray(pixels) for pixels in noise], "text": texts})


def training_arguments(folder: Path, batch_size: int) -> TrainingArguments:
    """One epoch, without checkpoints and without output."""
    training = {"num_train_epochs": 1, "per_device_train_batch_size": batch_size, "learning_rate": 1e-3}
    reading = {"remove_unused_columns": False, "dataloader_pin_memory": False}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error"}
    return TrainingArguments(str(folder / "run"), logging_steps=1, **training, **reading, **quiet)


def train(trainer: Trainer) -> tuple[float, list[float]]:
    """Train; return the seconds of the processor per step, and the losses."""
    trainer.remove_callback(PrinterCallback)
    seconds = timed(trainer.train)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds / len(losses), losses


def pages_read_per_second(folder: Path, number: int) -> float:
    """How many pages' tokens are read in a second of the processor, in random order."""
    encoder, image_processor = waiting_encoder(0, width=1024), DeepSeekOCRVisionImageProcessor(size=64)
    pages = random_pages(number, size=64)
    pages = precompute_features(pages, encoder, image_processor, cache_dir=folder / "read", show_progress=False)
    pages = pages.remove_columns("image")
    order = random.Random(0).sample(range(number), number)
    return number / timed(lambda: [pages[row]["features"].shape for row in order])


def timed(function: Callable[[], Any]) -> float:
    """Seconds of the processor that a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
