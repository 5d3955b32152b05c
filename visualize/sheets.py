"""Everything that can be seen of a page on one sheet, with scales and words."""

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from deepseek_ocr_vision.visualize.maps import TokenPlace, require_token
from deepseek_ocr_vision.visualize.pages import PageMap, PageView, colormap, draw_frame


PANEL_WIDTH = 3.7  # inches
PANEL_HEIGHTS = (1.0, 5.6)  # inches; a page that is higher or wider gets a margin
TITLE_HEIGHT, SCALE_WIDTH = 0.35, 0.6  # inches
LEAST_SIDE = 1000  # pixels of a page's longer side on the sheet, so that frames are fine on small pages too
CLOSE_UP = 1  # tokens around the chosen one

Panel = tuple[Image.Image, str, PageMap | None]
"""What is drawn, its title, and the map whose colours need a scale."""


def draw_sheet(
    view: PageView, token: TokenPlace | None = None, *, layer: int = -1, title: str | None = None
) -> Image.Image:
    """Draw a page with its PCA, and a token's similarity, attention and pixel gradient.

    Args:
        view: The page, as `view_page` gives it.
        token: Row and column of the token; by default the one with the most on its square.
        layer: The CLIP layer whose attention is drawn, counted from 0, or from -1 backwards; the mean of its heads.
        title: What is written on top; by default the size of the page and the number of tokens.

    Returns:
        An image in RGB, some 1400 pixels wide.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `token` is no pair of integers.
        ValueError: There is no such token or layer.
    """
    colormap("viridis")
    token = view.richest_token() if token is None else require_token(token, view.grid)
    attention = view.attention(token, layer=layer)
    maps = [view.pca(), view.similarity(token), attention, view.pixel_gradient(token)]
    scaled = _scaled(view)
    images = [replace(one, view=scaled).draw() for one in maps]
    page = scaled.page.copy()
    draw_frame(page, scaled.box(token))
    row, column = token
    panels: list[Panel] = [(page, f"the page, and the token in row {row}, column {column}", None)]
    panels += [(image, one.title, one) for image, one in zip(images, maps, strict=True)]
    panels.append((images[-1].crop(_close_up(scaled, token)), "the same from near by", maps[-1]))
    (width, height), (rows, columns) = view.page.size, view.grid
    title = title or f"{width} x {height} pixels, {rows} x {columns} tokens"
    return _drawn(panels, title, height_to_width=page.height / page.width)


def _scaled(view: PageView) -> PageView:
    """The same page, in a size that suits a sheet: no smaller than what the encoder read."""
    left, top, right, bottom = view.place
    scale = max(LEAST_SIDE, right - left, bottom - top) / max(view.page.size)
    size = [max(1, round(side * scale)) for side in view.page.size]
    return replace(view, page=view.page.resize(size, Image.Resampling.BICUBIC))


def _close_up(view: PageView, token: TokenPlace) -> tuple[int, int, int, int]:
    """The box of a token and its neighbours, on the page."""
    (row, column), (rows, columns) = token, view.grid
    first = view.box((max(0, row - CLOSE_UP), max(0, column - CLOSE_UP)))
    last = view.box((min(rows - 1, row + CLOSE_UP), min(columns - 1, column + CLOSE_UP)))
    left, top, right, bottom = round(first[0]), round(first[1]), round(last[2]), round(last[3])
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _drawn(panels: list[Panel], title: str, *, height_to_width: float) -> Image.Image:
    """Panels in two rows of three, each an image, its title and the map whose colours need a scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = float(np.clip(PANEL_WIDTH * height_to_width, *PANEL_HEIGHTS)) + TITLE_HEIGHT
    size = (3 * (PANEL_WIDTH + SCALE_WIDTH), 2 * height + TITLE_HEIGHT)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for axes, (image, caption, shown) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.set_title(caption, fontsize=10)
        axes.spines[:].set_color("#bbbbbb")
        if shown is not None and shown.values.ndim == 2:
            _draw_scale(figure, axes, shown, image)
    figure.suptitle(title, parse_math=False)  # a file's name may hold dollars
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_scale(figure: Any, axes: Any, shown: PageMap, image: Image.Image) -> None:
    """Draw which number has which colour, as pale as over white paper."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(*shown.limits), colormap(shown.colormap))
    # Length to width of a bar that is as high as the image beside it.
    aspect = 20 * image.height / image.width
    bar = figure.colorbar(scale, ax=axes, alpha=shown.alpha, fraction=0.046, pad=0.02, aspect=aspect)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
