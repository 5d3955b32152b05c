"""Train a small encoder to read each token's square of a page, and draw what it sees of text, a table, a receipt.

    python examples/seeing.py                                 # a quarter of an hour on one core
    python examples/seeing.py --pdf manual.pdf --pdf_page 6   # with a part of a page of yours, which it does not read
    python examples/seeing.py --help

A small language model gets one token of a page, and nothing else of it, and has to write what stands on the square of
64 x 64 pixels that the token stands for. It learns that on typewritten pages of English. What it leaves in
`--output_dir`:

    encoder/        the trained encoder with its image processor, for `deepseek-ocr-vision show PAGE --model ...`
    pages.png       text that was held out, a table, a receipt and the PDF's page; their tokens as colours; and what is
                    read from each token, on its square
    page.png        the receipt
    sheet.png       that page, and what is seen from one of its tokens
    letters.png     the pixels by which that token knows each of its letters
    training/       encoder and language model, as `Trainer` saves them
"""

import argparse
import logging
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from passages import SPLITS, read_texts, split_texts
from PIL import Image, ImageDraw, ImageFont
from report import character_error_rate
from torch import nn
from torch.utils.data import Dataset
from training_defaults import SmallModelArguments
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, set_seed

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites.small import byte_tokenizer, small_encoder_config, small_text_config
from deepseek_ocr_vision.encoding.sources import page_of
from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import TOKEN_SIZE
from deepseek_ocr_vision.visualize import PageView, draw_sheet, view_page
from deepseek_ocr_vision.visualize.pages import save_image


logger = logging.getLogger("seeing")

FONT, BOLD = "DejaVuSansMono", "DejaVuSansMono-Bold"
EM, ADVANCE, PITCH = 26, 16, 32  # pixels of an em, from letter to letter, and from line to line
MOST_CHARACTERS = 32  # written for a square, of which eight can be right
NUM_TRAINING_PAGES, NUM_HELD_OUT_PAGES = 100_000, 10
NUM_LETTERS = 4  # of which the pixels are drawn
PDF_DPI = 190
RECEIPT = "a receipt"


# Pages and what stands on each square


class Line(NamedTuple):
    """A line of typewritten text, in rows and columns of letters from the page's upper left corner."""

    row: int
    column: int
    text: str
    font: str = FONT


@cache
def open_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of matplotlib's, with so many pixels of an em."""
    path = Path(mpl.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def draw_page(lines: Iterable[Line], page_size: int, *, rules: Iterable[float] = ()) -> dict:
    """A page: `image`, and `texts`, what stands on the square of each token.

    Args:
        lines: What is written, from top to bottom; what does not fit on the page is cut off.
        page_size: Side of the page in pixels.
        rules: Rows before which a rule is drawn across the page.
    """
    page = Image.new("L", (page_size, page_size), color=255)
    canvas = ImageDraw.Draw(page)
    cells = [[""] * (page_size // ADVANCE) for _ in range(page_size // PITCH)]
    for row, column, text, font in lines:
        canvas.text((column * ADVANCE, (row + 0.75) * PITCH), text, fill=0, font=open_font(font, EM), anchor="ls")
        for place, letter in zip(range(column, len(cells[0])), text if row < len(cells) else "", strict=False):
            cells[row][place] = letter.lower() if letter.isascii() and letter.isprintable() else ""
    for row in rules:
        canvas.line((2 * PITCH, row * PITCH, page_size - 2 * PITCH, row * PITCH), fill=0, width=2)
    return {"image": page.convert("RGB"), "texts": texts_of_squares(cells)}


def texts_of_squares(cells: list[list[str]]) -> list[str]:
    """What stands on each square, line by line, of letters in rows and columns of the page."""
    rows, columns = TOKEN_SIZE // PITCH, TOKEN_SIZE // ADVANCE
    squares = [
        ["".join(line[left : left + columns]).strip() for line in cells[top : top + rows]]
        for top in range(0, len(cells), rows)
        for left in range(0, len(cells[0]), columns)
    ]
    return ["\n".join(filter(None, lines)) for lines in squares]


class TextPages(Dataset):
    """Typewritten pages of paragraphs of English; some are bold, in capitals, or digits.

    Page `index` follows from the stream and `index` alone.

    Args:
        text: What is written on the pages.
        num_pages: Number of pages.
        page_size: Side of a page in pixels, a multiple of 64.
        stream: Numbers that tell these pages from others.
    """

    def __init__(self, text: str, *, num_pages: int, page_size: int, stream: tuple[int, ...]):
        self.text, self.num_pages, self.page_size, self.stream = text, num_pages, page_size, stream

    def __len__(self) -> int:
        return self.num_pages

    def __getitem__(self, index: int) -> dict:
        """Page `index`, as `draw_page` gives it."""
        if not 0 <= index < self.num_pages:
            raise IndexError(f"There is no page {index}; there are {self.num_pages}.")
        lines, rules = self.lines_and_rules(np.random.default_rng([*self.stream, index]))
        return draw_page(lines, self.page_size, rules=rules)

    def lines_and_rules(self, rng: np.random.Generator) -> tuple[list[Line], list[float]]:
        """Lines down to the foot of the page, and rules between some paragraphs."""
        row, last = int(rng.integers(3)), self.page_size // PITCH
        lines: list[Line] = []
        rules: list[float] = []
        while row < last:
            column, start, change = int(rng.integers(6)), int(rng.integers(len(self.text) - 10_000)), rng.random()
            length = self.page_size // ADVANCE - column - int(rng.integers(6))
            font = BOLD if rng.random() < 0.2 else FONT
            for _ in range(int(rng.integers(1, 7))):
                text = self.text[start : start + length]
                if change < 0.2:
                    text = "".join(str(rng.integers(10)) if letter.isalnum() else letter for letter in text)
                lines.append(Line(row, column, text.upper() if change > 0.9 else text, font))
                row, start = row + 1, start + length
            if rng.random() < 0.4:
                rules.append(row + float(rng.choice([0.25, 0.5, 0.75])))
            row += int(rng.integers(1, 3))
        return lines, rules


# Pages as people have them


def text_page(text: str, page_size: int) -> dict:
    """A page of a text under a heading."""
    heading = Line(2, 4, "What was held out", BOLD)
    wrapped = textwrap.wrap(text[:4000], page_size // ADVANCE - 8)[: page_size // PITCH - 7]
    return draw_page([heading, *(Line(5 + row, 4, line) for row, line in enumerate(wrapped))], page_size)


def table_page(page_size: int) -> dict:
    """A page with a table."""
    rows = [("Mode", "Pixels", "Tokens", "Views"), ("tiny", "512 x 512", "64", "one")]
    rows += [("small", "640 x 640", "100", "one"), ("base", "1024 x 1024", "256", "one")]
    rows += [("large", "1280 x 1280", "400", "one"), ("gundam", "640 x 640", "100 a tile", "tiles and page")]
    lines = [
        Line(8 + 2 * row, column, cell, FONT if row else BOLD)
        for row, cells in enumerate(rows)
        for column, cell in zip((5, 15, 30, 44), cells, strict=True)
    ]
    caption = Line(4, 5, "Table 1. Modes and what they make of a page.")
    return draw_page([caption, *lines], page_size, rules=(6.5, 9.5, 20))


def receipt_page(page_size: int) -> dict:
    """A page with a receipt."""
    goods = {"Paper, A4": 450, "Ink, black": 1295, "Envelopes": 380, "Pencil HB": 90, "Ruler, 30 cm": 215}
    prices = [(name, f"{cents / 100:.2f}") for name, cents in (goods | {"TOTAL": sum(goods.values())}).items()]
    lines = [Line(3, 24, "THE PAPER SHOP", BOLD), Line(6, 12, "26 November 2026, 16:05, till 3")]
    for index, (name, price) in enumerate(prices):
        row = 10 + 2 * index + (index == len(goods))
        lines += [Line(row, 12, name), Line(row, 52 - len(price), price)]
    return draw_page(lines, page_size, rules=(8.5, 20.5))


def pdf_page(path: Path, number: int, page_size: int) -> dict:
    """The upper left part of a page of a PDF, in letters of about the size that the others have."""
    page = page_of(path, number, dpi=PDF_DPI)
    image = Image.new("RGB", (page_size, page_size), "white")
    image.paste(page, (-page.width // 10, 0))  # less most of its margin
    return {"image": image}


# The model


class SquareReader(nn.Module):
    """The encoder, and a small language model that continues each of its tokens by itself."""

    def __init__(self, encoder: DeepSeekOCRVisionModel):
        super().__init__()
        self.tokenizer = byte_tokenizer()
        self.encoder, self.language_model = encoder, LlamaForCausalLM(small_text_config(self.tokenizer))
        self.projector = nn.Linear(encoder.config.hidden_size, self.language_model.config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of the texts `labels` [B, N, T] of all squares."""
        tokens, labels = self.encoder(pixel_values).last_hidden_state.flatten(0, 1), labels.flatten(0, 1)
        logits = self.logits(tokens, labels.clamp(min=0))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    def logits(self, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Scores [S, T, vocabulary] of what follows each of S tokens [S, C] and the text `ids` [S, T] before it."""
        embedded = self.language_model.get_input_embeddings()(ids[:, :-1])
        return self.language_model(inputs_embeds=torch.cat([self.projector(tokens)[:, None], embedded], dim=1)).logits

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> list[str]:
        """What is written on the squares of tokens [S, C], as far as it can tell."""
        embedded = self.projector(tokens)[:, None]
        output = self.language_model.generate(
            inputs_embeds=embedded, do_sample=False, max_new_tokens=MOST_CHARACTERS + 1
        )
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)


class Collator:
    """Makes a batch of pages.

    Args:
        image_processor: What prepares the images.
        tokenizer: What makes ids of the texts.
    """

    def __init__(self, image_processor: DeepSeekOCRVisionImageProcessor, tokenizer: PreTrainedTokenizerBase):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, pages: list[dict]) -> dict[str, torch.Tensor]:
        """`pixel_values` [B, 3, H, W] and `labels` [B, N, T], each text with its end."""
        pixel_values = self.image_processor([page["image"] for page in pages], return_tensors="pt").pixel_values
        texts = [text + self.tokenizer.eos_token for page in pages for text in page["texts"]]
        made = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return {"pixel_values": pixel_values, "labels": labels.unflatten(0, (len(pages), -1))}


def build_reader(page_size: int) -> SquareReader:
    """A new reader, whose encoder has 1 M parameters."""
    config = small_encoder_config(page_size)
    # A page has 4096 patches; their stage looks no further than the square of a token.
    config.sam_config.global_attn_indexes = []
    return SquareReader(DeepSeekOCRVisionModel(config))


# What it sees


def choose_token(read: list[str], written: list[str], num_columns: int) -> tuple[int, int]:
    """The token with the most letters and digits that were read without a mistake."""
    right = [sum(map(str.isalnum, text)) if text == other else 0 for text, other in zip(read, written, strict=True)]
    return divmod(right.index(max(right)), num_columns)


def draw(
    reader: SquareReader, image_processor: DeepSeekOCRVisionImageProcessor, pages: dict[str, dict], folder: Path
) -> None:
    """Draw all pages, and of the receipt the sheet and the pixels that a token's letters depend on."""
    reader.requires_grad_(False)
    views = [view_page(reader.encoder, page["image"], image_processor=image_processor) for page in pages.values()]
    texts = [reader.read(view.tokens.flatten(0, 1)) for view in views]
    for read, (name, page) in zip(texts, pages.items(), strict=True):
        if "texts" in page:
            logger.info("%s: %.1f %% read", name, 100 * (1 - character_error_rate(read, page["texts"])))
    draw_pages(views, texts, list(pages), folder / "pages.png")
    index = list(pages).index(RECEIPT)
    page, view, read = pages[RECEIPT], views[index], texts[index]
    row, column = choose_token(read, page["texts"], view.grid[1])
    save_in_256_colors(page["image"], folder / "page.png")
    save_in_256_colors(draw_sheet(view, (row, column), layer=0, title=RECEIPT), folder / "sheet.png")
    draw_letters(reader, view, (row, column), read[row * view.grid[1] + column], folder / "letters.png")


def draw_texts(view: PageView, texts: list[str]) -> Image.Image:
    """A page with what was read from each token on its square."""
    page = Image.new("RGB", view.page.size, "white")
    canvas = ImageDraw.Draw(page)
    for index, text in enumerate(texts):
        left, top, right, bottom = view.box((index // view.grid[1], index % view.grid[1]))
        canvas.rectangle((left, top, right, bottom), outline=(225, 225, 225))
        if text:
            lines = text.split("\n")
            em = min(EM, int((right - left) / (0.62 * max(map(len, lines)))), int((bottom - top) / (1.2 * len(lines))))
            font, middle = open_font(FONT, max(em, 4)), (top + bottom) / 2
            canvas.multiline_text((left, middle), text, fill=(20, 60, 120), font=font, anchor="lm", spacing=em // 6)
    return page


def draw_pages(views: list[PageView], texts: list[list[str]], names: list[str], path: Path) -> None:
    """Each page; below it its tokens as colours; and what was read from each of them."""
    figure = Figure(figsize=(4 * len(views), 12.4), dpi=120, layout="constrained")
    axes = figure.subplots(3, len(views), squeeze=False)
    for column, (view, read, name) in enumerate(zip(views, texts, names, strict=True)):
        for row, image in enumerate((view.page, view.pca().draw(alpha=0.55), draw_texts(view, read))):
            axes[row, column].imshow(image)
            axes[row, column].set(xticks=[], yticks=[], title="" if row else name)
    for row, label in enumerate(("the page", "its tokens as colours", "read from each token alone")):
        axes[row, 0].set_ylabel(label, fontsize=13)
    save_drawn(figure, path)


def draw_letters(reader: SquareReader, view: PageView, token: tuple[int, int], text: str, path: Path) -> None:
    """The square of a token from near by, and the pixels that some letters read from it depend on."""
    ids = reader.tokenizer(text or " ", return_tensors="pt")["input_ids"]
    places = [index for index, letter in enumerate(text) if letter.isalnum()][:NUM_LETTERS]

    def score(tokens: torch.Tensor, index: int) -> torch.Tensor:
        return reader.logits(tokens[token][None], ids)[0, index].log_softmax(-1)[ids[0, index]]

    left, top, right, bottom = view.box(token)
    half = TOKEN_SIZE / 2
    close = tuple(round(side) for side in (left - half, top - half, right + half, bottom + half))
    maps = [(f"“{text[index]}”", view.pixel_gradient(partial(score, index=index))) for index in places]
    images = [("the page", view.page), *((name, replace(one, token=token).draw()) for name, one in maps)]
    figure = Figure(figsize=(2.6 * len(images), 2.9), dpi=110, layout="constrained")
    for axes, (title, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images, strict=True):
        axes.imshow(image.crop(close), interpolation="nearest")
        axes.set(xticks=[], yticks=[], title=title)
    save_drawn(figure, path)


def save_drawn(figure: Figure, path: Path) -> None:
    """Write a figure in 256 colours."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_in_256_colors(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def save_in_256_colors(image: Image.Image, path: Path) -> None:
    """Write an image in half the bytes; it is dithered, so that no edges come where colours pass into each other."""
    save_image(image.quantize(palette=image.quantize(), dither=Image.Dither.FLOYDSTEINBERG), path)


# From the command line


def train(options: argparse.Namespace) -> None:
    """Train a reader, measure it on held-out pages, and leave encoder and images."""
    set_seed(options.seed)
    splits = split_texts(read_texts([]), held_out_fraction=0.1, seed=options.seed)
    numbers = zip(SPLITS, (NUM_TRAINING_PAGES, NUM_HELD_OUT_PAGES), strict=True)
    pages, held_out = (
        TextPages(" ".join(splits[split]), num_pages=number, page_size=options.page_size, stream=(options.seed, index))
        for index, (split, number) in enumerate(numbers)
    )
    reader = build_reader(options.page_size)
    image_processor = DeepSeekOCRVisionImageProcessor(size=options.page_size)
    collator = Collator(image_processor, reader.tokenizer)
    arguments = SmallModelArguments(
        str(options.output_dir / "training"),
        max_steps=options.max_steps,
        per_device_train_batch_size=1,
        logging_steps=50,
        save_strategy="no",
        seed=options.seed,
    )
    trainer = Trainer(reader, arguments, data_collator=collator, train_dataset=pages)
    trainer.train()
    trainer.save_model()
    reader.eval().encoder.save_pretrained(options.output_dir / "encoder")
    image_processor.save_pretrained(options.output_dir / "encoder")
    logger.info("held-out pages: %.1f %% read", 100 * measure(reader, collator, held_out))
    draw(reader, image_processor, shown_pages(held_out.text, options), options.output_dir)


@torch.no_grad()
def measure(reader: SquareReader, collator: Collator, pages: TextPages) -> float:
    """The share of the characters of pages that is read."""
    read: list[str] = []
    for page in pages:
        pixels = collator([page])["pixel_values"].to(reader.encoder.device)
        read += reader.read(reader.encoder(pixels).last_hidden_state[0])
    return 1 - character_error_rate(read, [text for page in pages for text in page["texts"]])


def shown_pages(text: str, options: argparse.Namespace) -> dict[str, dict]:
    """The pages that are drawn, by their titles."""
    size = options.page_size
    pages = {"text": text_page(text, size), "a table": table_page(size), RECEIPT: receipt_page(size)}
    if options.pdf:
        pages[f"{options.pdf.name}, page {options.pdf_page}"] = pdf_page(options.pdf, options.pdf_page, size)
    return pages


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/seeing"), help="Folder for what this makes.")
    add("--max_steps", type=int, default=900, help="Optimizer steps, of a page each.")
    add("--page_size", type=int, default=1024, help="Side of a page in pixels, a multiple of 64.")
    add("--pdf", type=Path, help="A PDF of which a page is shown too.")
    add("--pdf_page", type=int, default=1, help="Which page of it, from 1.")
    add("--seed", type=int, default=0, help="What weights and pages are drawn from.")
    logging.basicConfig(level=logging.INFO)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
