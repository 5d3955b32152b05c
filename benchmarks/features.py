"""Measure training from stored features beside training from pictures.

    python -m benchmarks.features         # about 2 minutes on two cores

Two composites, each with its encoder frozen and a Llama of 0.4 M parameters that is trained, by `Trainer`, on pages of
handwritten digits: the one of `examples/`, whose encoder has 1 M parameters, at 128 x 128 pixels; and one with an
encoder of the full size, random weights, at 512 x 512. A step is everything that `Trainer` does: rows read, pictures
prepared, forward, backward, optimizer. Then what the store itself costs: reading pages of 256 tokens, 1024 wide, in
bfloat16, in random order; and the fingerprint of the encoder. Times are seconds of the processor, of all threads
together, so that they hold on a busy machine.
"""

import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from benchmarks.workers import ROOT
from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites import IMAGE_TOKEN, build_model, build_processor
from deepseek_ocr_vision.training.collator import ImageTextCollator
from deepseek_ocr_vision.training.feature_store import FeatureStore, ReadFeatures, encoder_fingerprint
from deepseek_ocr_vision.training.features import precompute_features
from deepseek_ocr_vision.training.precomputed import FeatureCollator, precomputed_features


sys.path.insert(0, str(ROOT / "examples"))

from pages import load_handwritten_pages


NUM_STORED = 1000


def main() -> None:
    """Measure, and write what came out."""
    with tempfile.TemporaryDirectory() as folder:
        write("| composite | step from pictures | from features | ratio | computing a page | losses differ by |")
        write("| --- | --- | --- | --- | --- | --- |")
        small = build_small()
        write(compare("examples', 128 x 128, 32 pages", *small, Path(folder), batch_size=32, num_steps=20))
        full = build_full(*small)
        write(compare("full-size encoder, 512 x 512, 2 pages", *full, Path(folder), batch_size=2, num_steps=5))
        write(fingerprinting(full[0].model.vision_tower))
        write(reading(Path(folder)))


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# Training


def build_small() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The composite of the examples, its encoder frozen."""
    set_seed(0)
    processor = build_processor()
    model = build_model(processor)
    model.model.vision_tower.freeze()
    return model, processor


def build_full(
    small: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The same with an encoder of the full size, for pages of 512 x 512."""
    set_seed(0)
    config = copy.deepcopy(small.config)
    config.vision_config = DeepSeekOCRVisionConfig()
    config.image_seq_length = 64
    processor = copy.deepcopy(processor)
    processor.image_processor.size = {"height": 512, "width": 512}
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.freeze()
    return model, processor


def compare(
    name: str,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    *,
    batch_size: int,
    num_steps: int,
) -> str:
    """Train from pictures and from features, from the same start on the same pages."""
    pages = handwritten(batch_size * num_steps, page_size=processor.image_processor.size["height"])
    tower = model.model.vision_tower
    start = time.process_time()
    stored = precompute_features(pages, tower, processor, cache_dir=folder / "features", show_progress=False)
    computing = (time.process_time() - start) / len(pages)
    stored = stored.remove_columns("image")
    state = copy.deepcopy(model.state_dict())
    by_pictures, expected = train(model, pages, ImageTextCollator(processor), batch_size, folder)
    model.load_state_dict(state)
    with precomputed_features(model, stored):
        by_features, losses = train(model, stored, FeatureCollator(processor), batch_size, folder)
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    ratio = by_pictures / by_features
    return (
        f"| {name} | {by_pictures:.3f} s | {by_features:.3f} s | **{ratio:.1f}** | {computing:.3f} s | "
        f"{difference:.1e} |"
    )


def handwritten(number: int, *, page_size: int) -> datasets.Dataset:
    """Pages of the examples as a dataset."""
    pages, _ = load_handwritten_pages(num_pages=number, num_held_out_pages=1, page_size=page_size, seed=0)
    rows = [pages[index] for index in range(number)]
    return datasets.Dataset.from_list([{"image": row["image"], "text": IMAGE_TOKEN + row["text"]} for row in rows])


def train(
    model: LlavaForConditionalGeneration,
    pages: datasets.Dataset,
    collator: ImageTextCollator,
    batch_size: int,
    folder: Path,
) -> tuple[float, list[float]]:
    """Seconds of the processor a step, over one epoch, and the losses."""
    arguments = TrainingArguments(
        str(folder / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=pages)
    trainer.remove_callback(PrinterCallback)
    seconds = timed(trainer.train)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds / len(losses), losses


# The store


def fingerprinting(encoder: DeepSeekOCRVisionModel) -> str:
    """What finding out about a change of weights costs."""
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values()) / 1e9
    seconds = timed(lambda: encoder_fingerprint(encoder))
    return f"fingerprint: {seconds:.1f} s for {size:.2f} GB, {size / seconds:.2f} GB/s"


def reading(folder: Path) -> str:
    """Rows of a dataset with features, in random order."""
    store = FeatureStore(folder / "pages", {}, dtype=torch.bfloat16, width=1024)
    tokens = torch.randn(1, 256, 1024).bfloat16()
    for start in range(0, NUM_STORED, 100):
        keys = [str(index) for index in range(start, start + 100)]
        store.write(keys, (([key], tokens) for key in keys))
    store.refresh()
    transform = ReadFeatures("features", store.rows(), torch.bfloat16, "")
    pages = datasets.Dataset.from_dict({"features": list(range(NUM_STORED))}).with_transform(transform)
    order = random.Random(0).sample(range(NUM_STORED), NUM_STORED)
    seconds = timed(lambda: [pages[row]["features"].shape for row in order])
    return (
        f"reading: {NUM_STORED / seconds:,.0f} pages a second, {NUM_STORED * tokens.nbytes / 1e9 / seconds:.2f} GB/s"
    )


def timed(function: Callable[[], Any]) -> float:
    """Seconds of the processor that a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
