"""Train a small encoder on pages of handwriting, token by token, and draw what it sees.

    python examples/seeing.py            # some minutes on two cores
    python examples/seeing.py --help

Each token has to tell which digit is on its square and which one comes next in the order of reading. For the first its
own pixels suffice. For the second it has to look at others, and as the SAM stage here attends in windows only, it is
the CLIP stage that looks: its attention can be read off a sheet. What it leaves in `--output_dir`:

    encoder/        the trained encoder with its image processor, for `deepseek-ocr-vision show PAGE --model ...`
    page.png        a page of scans that were held out
    sheet.png       that page, and what is seen from one of its tokens
    next.png        the pixels by which that token knows which digit comes next
    training/       encoder and answers, as `Trainer` saves them
"""

import argparse
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pages import SPLITS, HandwrittenPages, split_scans
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites.small import small_encoder_config
from deepseek_ocr_vision.visualize import PageView, draw_sheet, view_page
from deepseek_ocr_vision.visualize.pages import save_image


logger = logging.getLogger("seeing")

EMPTY = 10  # the class of a square without a digit, after those of the ten digits
NUM_CLASSES = 11
NOT_ASKED = -100  # the label that torch's cross entropy passes over
NUM_TRAINING_PAGES, NUM_HELD_OUT_PAGES = 100_000, 50


class LabelledPages(HandwrittenPages):
    """Pages of handwritten digits with two labels a token: its digit, and the next one in the order of reading."""

    def __getitem__(self, index: int) -> dict:
        """Page `index`: `image`, and `labels` [N, 2]; nothing comes next for the last digit and for empty squares."""
        page = super().__getitem__(index)
        digits = self.choose_digits(np.random.default_rng([*self.stream, index]))
        labels = np.tile([EMPTY, NOT_ASKED], (len(self.rows()) ** 2, 1))
        squares = [row * len(self.rows()) + column for (row, column), _ in digits]
        labels[squares, 0] = [self.scans.digits[scan] for _, scan in digits]
        labels[squares[:-1], 1] = labels[squares[1:], 0]
        return {"image": page["image"], "labels": torch.from_numpy(labels)}


class TokenReader(nn.Module):
    """The encoder with one linear layer on its tokens, which scores both answers of each."""

    def __init__(self, encoder: DeepSeekOCRVisionModel):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2 * NUM_CLASSES)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss, and scores [B, N, 2, classes]."""
        logits = self.scores(self.encoder(pixel_values).last_hidden_state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=NOT_ASKED)
        return {"loss": loss, "logits": logits}

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:  # [..., C] -> [..., 2, classes]
        return self.head(tokens).unflatten(-1, (2, NUM_CLASSES))


class Collator:
    """Makes a batch of pages.

    Args:
        image_processor: What prepares the images.
    """

    def __init__(self, image_processor: DeepSeekOCRVisionImageProcessor):
        self.image_processor = image_processor

    def __call__(self, pages: list[dict]) -> dict[str, torch.Tensor]:
        """`pixel_values` [B, 3, H, W] and `labels` [B, N, 2]."""
        pixel_values = self.image_processor([page["image"] for page in pages], return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": torch.stack([page["labels"] for page in pages])}


def build_reader(page_size: int) -> TokenReader:
    """A new reader, whose encoder has some 1 M parameters."""
    config = small_encoder_config(page_size)
    config.sam_config.global_attn_indexes = []
    return TokenReader(DeepSeekOCRVisionModel(config))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Part of the digits that were told right, and of the digits that come next."""
    right = logits.argmax(axis=-1) == labels  # [B, N, 2]
    is_digit = labels[..., 0] < EMPTY
    is_asked = labels[..., 1] != NOT_ASKED
    return {"digits": float(right[..., 0][is_digit].mean()), "next_digits": float(right[..., 1][is_asked].mean())}


def num_digits(page: dict) -> int:
    """Number of digits on a page."""
    return int((page["labels"][:, 0] < EMPTY).sum())


def choose_token(reader: TokenReader, view: PageView, labels: torch.Tensor) -> tuple[int, int]:
    """The token nearest to the middle whose next digit is two squares on; first of all one that tells it right."""
    is_digit = labels[..., 0] < EMPTY  # [H, W]
    has_gap = is_digit[:, :-2] & ~is_digit[:, 1:-1] & is_digit[:, 2:]
    is_told = (reader.scores(view.tokens).argmax(dim=-1) == labels)[..., 1]
    middle = (len(labels) / 2, len(labels) / 2)
    tokens = [tuple(token) for token in has_gap.nonzero().tolist()]
    if not tokens:
        raise ValueError("No digit on the page has an empty square and a digit after it; take a larger --page_size.")
    return min(tokens, key=lambda token: (not is_told[token], math.dist(token, middle)))


def draw(reader: TokenReader, image_processor: DeepSeekOCRVisionImageProcessor, page: dict, folder: Path) -> None:
    """Draw a page, its sheet, and what a token's answer for the next digit depends on."""
    view = view_page(reader.encoder, page["image"], image_processor=image_processor)
    labels = page["labels"].view(*view.grid, 2)
    row, column = token = choose_token(reader, view, labels)
    next_digit = labels[row, column, 1]
    gradient = view.pixel_gradient(lambda tokens: reader.scores(tokens[row, column])[1].log_softmax(0)[next_digit])
    save_in_256_colors(page["image"], folder / "page.png")
    sheet = draw_sheet(view, token, layer=0, title="A held-out page of handwritten digits")
    save_in_256_colors(sheet, folder / "sheet.png")
    save_in_256_colors(replace(gradient, token=token).picture(), folder / "next.png")


def save_in_256_colors(image: Image.Image, path: Path) -> None:
    """Write an image in half the bytes; it is dithered, so that no edges come where colours pass into each other."""
    save_image(image.quantize(palette=image.quantize(), dither=Image.Dither.FLOYDSTEINBERG), path)


def train(output_dir: Path, *, max_steps: int, page_size: int, seed: int) -> None:
    """Train a reader, measure it on held-out pages, and leave encoder and images."""
    set_seed(seed)
    scans = split_scans(seed)
    numbers = zip(SPLITS, (NUM_TRAINING_PAGES, NUM_HELD_OUT_PAGES), strict=True)
    pages, held_out = (
        LabelledPages(scans[split], num_pages=number, page_size=page_size, seed=seed, split=split)
        for split, number in numbers
    )
    reader = build_reader(page_size)
    image_processor = DeepSeekOCRVisionImageProcessor(size=page_size)
    trainer = Trainer(
        reader,
        training_arguments(output_dir, max_steps=max_steps, seed=seed),
        data_collator=Collator(image_processor),
        train_dataset=pages,
        eval_dataset=held_out,
        compute_metrics=lambda prediction: accuracy(prediction.predictions, prediction.label_ids),
    )
    trainer.train()
    trainer.save_model()
    logger.info("held-out pages: %s", trainer.evaluate())
    reader.encoder.save_pretrained(output_dir / "encoder")
    image_processor.save_pretrained(output_dir / "encoder")
    # An empty page is easier to look at.
    draw(reader, image_processor, min(held_out, key=num_digits), output_dir)


def training_arguments(output_dir: Path, *, max_steps: int, seed: int) -> TrainingArguments:
    """transformers' arguments, for a small model."""
    return TrainingArguments(
        str(output_dir / "training"),
        max_steps=max_steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/seeing"), help="Folder for what this makes.")
    parser.add_argument("--max_steps", type=int, default=1000, help="Optimizer steps, of 8 pages each.")
    parser.add_argument("--page_size", type=int, default=512, help="Side of a page in pixels, a multiple of 64.")
    parser.add_argument("--seed", type=int, default=0, help="What weights and pages are drawn from.")
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO)
    train(arguments.pop("output_dir"), **arguments)


if __name__ == "__main__":
    main()
