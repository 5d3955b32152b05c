"""Draw the figure of README.md: a page of text, and the tokens that an encoder makes of it.

python docs/figures/page.py outputs/finetune/encoder     # writes docs/page.png
"""

import sys
from pathlib import Path

import matplotlib


matplotlib.use("agg")
from matplotlib import pyplot
from PIL import Image

from deepseek_ocr_vision import text_to_pages
from deepseek_ocr_vision.visualize import view_page
from deepseek_ocr_vision.weights import load_encoder


ROOT = Path(__file__).resolve().parents[2]
PAGE_SIZE = 1024


def text_page() -> Image.Image:
    """A page with a heading, paragraphs and a short list: the licence and the credits of this package."""
    text = "\n\n".join((ROOT / name).read_text() for name in ("LICENSE", "NOTICE"))
    return text_to_pages(text, size=PAGE_SIZE, font_size=22, margin=64)[0].convert("RGB")


def draw(source: str, path: Path) -> None:
    """Draw the page, the page with the squares of its tokens, and the tokens as colours."""
    model, image_processor = load_encoder(source)
    image_processor.size = {"height": PAGE_SIZE, "width": PAGE_SIZE}
    view = view_page(model, text_page(), image_processor=image_processor)
    rows, columns = view.grid
    panels = (
        (view.page, f"a page of {PAGE_SIZE} x {PAGE_SIZE} pixels"),
        (view.pca().picture(alpha=0.55), f"{rows} x {columns} tokens, a square of 64 x 64 pixels each"),
        (view.pca().values, "what a language model reads: alike colours are alike tokens"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12.6, 4.5), layout="constrained")
    for axis, (image, title) in zip(axes, panels, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(sys.argv[1], ROOT / "docs" / "page.png")
