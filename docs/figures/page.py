"""Draw the figure of README.md: a page of text, and the tokens that an encoder makes of it.

python examples/optical_memory.py --train_encoder true
python docs/figures/page.py outputs/optical_memory/trained/composite     # writes docs/page.png
"""

import re
import sys
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("agg")
from matplotlib import pyplot
from PIL import Image

from deepseek_ocr_vision import TextRenderer, load_encoder
from deepseek_ocr_vision.visualize import view_page
from deepseek_ocr_vision.visualize.pages import save_image


ROOT = Path(__file__).resolve().parents[2]
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
PAGE_SIZE = 1024


def text_page() -> Image.Image:
    """The first page of licence and credits, in the letters that the example trains on."""
    renderer = TextRenderer(size=PAGE_SIZE, font=str(FONT), font_size=26, margin=32)
    text = "\n\n".join((ROOT / name).read_text() for name in ("LICENSE", "NOTICE"))
    text = re.sub(r"(?<=\S)\n(?=\S)", " ", text)  # the page breaks the lines of a paragraph
    return next(renderer.pages(text)).image.convert("RGB")


def draw(source: str, path: Path) -> None:
    """Draw the page, the page with the squares of its tokens, and the tokens as colours."""
    model, image_processor = load_encoder(source)
    image_processor.size = {"height": PAGE_SIZE, "width": PAGE_SIZE}
    view = view_page(model, text_page(), image_processor=image_processor)
    rows, columns = view.grid
    panels = (
        (view.page, f"a page of {PAGE_SIZE} x {PAGE_SIZE} pixels"),
        (view.pca().picture(alpha=0.55), f"{rows} x {columns} tokens, a square of 64 x 64 pixels each"),
        (view.pca().values, "the tokens alone: like colours are like tokens"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12.6, 4.5), layout="constrained")
    for axis, (image, title) in zip(axes, panels, strict=True):
        axis.imshow(image, interpolation="nearest" if title == panels[-1][1] else "antialiased")
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=10)
    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    save_image(drawn.quantize(), path)


if __name__ == "__main__":
    draw(sys.argv[1], ROOT / "docs" / "page.png")
