"""predictions.png: held-out pages, what is written on each and what was read, in full, with differences marked."""

from pathlib import Path
from typing import NamedTuple

from files import replacing
from PIL import Image, ImageDraw, ImageFont
from report import RIGHT, WRONG, character_error_rate
from torch.utils.data import Dataset

from finetuning.scores import RunResult
from finetuning.text_layout import FONT_SIZE, Piece, Span, Writer, compared, default_font, fonts_for


NUM_DRAWN_PAGES = 12
PAGE_SIDE, TEXT_WIDTH, GAP = 560, 860, 24  # pixels
LINE_PITCH = 27  # pixels
INK, FAINT, RULE = "#1f2328", "#59636e", "#d1d9e0"
MISSED = "#9a6700"  # what is written and was not read
MISSED_PAPER, WRONG_PAPER = "#fff3c4", "#ffdcd7"


class Block(NamedTuple):
    """Lines of text under a heading, and the colours of what differs."""

    heading: str
    lines: list[list[Span]]
    ink: str
    paper: str

    @property
    def height(self) -> int:
        """Pixels, with the gap below."""
        return LINE_PITCH * (len(self.lines) + 1) + GAP // 2


def draw_predictions(result: RunResult, pages: Dataset, path: Path) -> None:
    """Draw the first held-out pages, each beside its texts."""
    number = min(NUM_DRAWN_PAGES, len(result.read))
    images = [thumbnail(pages[index]["image"]) for index in range(number)]
    writer = Writer(fonts_for([*result.read[:number], *result.written[:number]]), TEXT_WIDTH)
    blocks = [blocks_of(result.written[index], result.read[index], writer) for index in range(number)]
    heights = [
        max(image.height + 2, sum(block.height for block in texts)) + GAP
        for image, texts in zip(images, blocks, strict=True)
    ]
    left = max(image.width for image in images) + 2 * GAP
    canvas = Image.new("RGB", (left + TEXT_WIDTH + GAP, 2 * LINE_PITCH + sum(heights)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP // 2), title_of(result, number), INK, ImageFont.truetype(default_font(), FONT_SIZE))
    top = 2 * LINE_PITCH
    for image, texts, height in zip(images, blocks, heights, strict=True):
        canvas.paste(image, (GAP, top + 1))
        pen.rectangle((GAP - 1, top, GAP + image.width, top + image.height + 1), outline=RULE)
        draw_blocks(pen, texts, left=left, top=top)
        top += height
    with replacing(path) as temporary:
        canvas.save(temporary)


def thumbnail(image: Image.Image) -> Image.Image:
    """A page that is not too large to stand beside its text."""
    smaller = image.copy()
    smaller.thumbnail((PAGE_SIDE, PAGE_SIDE), Image.Resampling.LANCZOS)
    return smaller


def title_of(result: RunResult, number: int) -> str:
    """What is shown, and how well all pages were read."""
    rate = character_error_rate(result.read, result.written)
    return f"The first {number} of {len(result.read)} held-out pages. Character error rate of all: {rate:.2%}"


def blocks_of(written: str, read: str, writer: Writer) -> list[Block]:
    """What stands on a page and what was read, or one block where these are the same."""
    left, right = compared(written, read)
    if written == read:
        return [Block("written, and read without a mistake", writer.lines(left), RIGHT, "white")]
    heading = f"read; character error rate {character_error_rate([read], [written]):.1%}"
    return [
        Block("written", writer.lines(left), MISSED, MISSED_PAPER),
        Block(heading, writer.lines(right or [Piece("(nothing)", True)]), WRONG, WRONG_PAPER),
    ]


def draw_blocks(pen: ImageDraw.ImageDraw, blocks: list[Block], *, left: int, top: int) -> None:
    """Draw blocks below each other, what differs in a colour of its own."""
    for block in blocks:
        ink = block.ink if block.paper == "white" else FAINT
        pen.text((left, top), block.heading, ink, ImageFont.truetype(default_font(), FONT_SIZE - 4))
        for number, line in enumerate(block.lines, start=1):
            for span in line:
                draw_span(pen, span, block, left=left, top=top + number * LINE_PITCH)
        top += block.height


def draw_span(pen: ImageDraw.ImageDraw, span: Span, block: Block, *, left: float, top: int) -> None:
    """Draw some characters of a line."""
    start = left + span.left
    if span.differs:
        # A line break that differs has no width of its own.
        pen.rectangle((start, top, start + (span.width or FONT_SIZE / 2), top + LINE_PITCH - 3), fill=block.paper)
    colour = block.ink if span.differs else INK
    pen.text((start, top + FONT_SIZE), span.text.rstrip("\n"), colour, span.font, anchor="ls")
