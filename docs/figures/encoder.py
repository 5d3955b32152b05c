"""Draw the figure of docs/encoder.md: what a page becomes on its way through the encoder.

python docs/figures/encoder.py     # writes docs/encoder.svg
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib


matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle


INK, PALE, GRID = "#1b2a41", "#eef2f8", "#5b7db1"
SAM, CLIP, BETWEEN = "#d7e5f7", "#fbe3cf", "#e4efdc"
MIDDLE = 1.62


class Stage(NamedTuple):
    """A box: where it is, what is written in it, and which stage its colour stands for."""

    left: float
    width: float
    name: str
    detail: str
    color: str


STAGES = (
    Stage(
        2.05,
        2.2,
        "SAM ViT-B",
        "12 blocks, 4 of them global,\n8 in windows of 14 x 14\n95.6 M with neck\nand compressor",
        SAM,
    ),
    Stage(5.6, 1.3, "compressor", "2 convolutions\nof stride 2:\n16 patches\nbecome a token", BETWEEN),
    Stage(8.25, 1.7, "CLIP-L", "24 layers,\nall tokens attend\nto all\n302.6 M", CLIP),
    Stage(
        10.9,
        2.1,
        "features",
        '"residual": sum, 1024\n"concat": both, 2048\n"projected": 1280\n"sequence": with marks',
        PALE,
    ),
)
# Left edge, side, squares in a row, and what is written below.
GRIDS = (
    (0.15, 1.2, 1, "page\n1024 x 1024"),
    (4.55, 0.75, 16, "64 x 64\npatches"),
    (7.2, 0.75, 4, "16 x 16\ntokens"),
)


def draw_stage(axes: Axes, stage: Stage) -> None:
    """Draw a box with its name and what is to know about it."""
    box = FancyBboxPatch(
        (stage.left, MIDDLE - 0.95),
        stage.width,
        1.9,
        boxstyle="round,pad=0,rounding_size=0.09",
        fc=stage.color,
        ec=INK,
    )
    axes.add_patch(box)
    center = stage.left + stage.width / 2
    axes.text(center, MIDDLE + 0.62, stage.name, ha="center", va="center", fontsize=12, weight="bold", color=INK)
    axes.text(center, MIDDLE - 0.22, stage.detail, ha="center", va="center", fontsize=8.7, color=INK, linespacing=1.5)


def draw_grid(axes: Axes, left: float, side: float, number: int, caption: str) -> None:
    """Draw squares in rows, a quarter as many as there are, with a caption."""
    bottom = MIDDLE - side / 2
    axes.add_patch(Rectangle((left, bottom), side, side, fc="white", ec=GRID))
    steps = [side * index / number for index in range(1, number)]
    axes.vlines([left + step for step in steps], bottom, bottom + side, color=GRID, lw=0.6)
    axes.hlines([bottom + step for step in steps], left, left + side, color=GRID, lw=0.6)
    axes.text(left + side / 2, bottom - 0.12, caption, ha="center", va="top", fontsize=9, color=INK)


def draw_lines_of_text(axes: Axes) -> None:
    """Draw what stands for the text on the page."""
    for index, width in enumerate((0.6, 0.9, 0.82, 0.9, 0.45, 0.9, 0.7)):
        axes.add_patch(Rectangle((0.3, MIDDLE + 0.38 - index * 0.14), width, 0.05, fc=GRID, ec="none"))


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    """Draw an arrow, straight unless `connectionstyle` says otherwise."""
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": INK, "shrinkA": 0, "shrinkB": 0} | style
    axes.add_patch(FancyArrowPatch(start, end, **style))


def main() -> None:
    """Write the figure beside the page that shows it."""
    pyplot.rcParams |= {"svg.hashsalt": "encoder", "font.family": "DejaVu Sans"}
    figure, axes = pyplot.subplots(figsize=(13.2, 3.3))
    for stage in STAGES:
        draw_stage(axes, stage)
    for grid in GRIDS:
        draw_grid(axes, *grid)
    draw_lines_of_text(axes)
    for start, end in ((1.4, 2.0), (4.3, 4.5), (5.35, 5.55), (6.95, 7.15), (8.0, 8.2), (10.0, 10.85)):
        draw_arrow(axes, (start, MIDDLE), (end, MIDDLE))
    around = "arc,angleA=90,angleB=90,armA=59.3,armB=19,rad=9"
    draw_arrow(axes, (7.575, MIDDLE + 0.42), (11.95, MIDDLE + 0.98), connectionstyle=around)
    axes.text(9.1, MIDDLE + 1.32, "the compressor's tokens as they are", ha="center", fontsize=8.7, color=INK)
    draw_arrow(axes, (11.9, 0.42), (0.8, 0.42), color="#b3442e", linestyle="--")
    axes.text(6.4, 0.16, "gradients, to every weight and every pixel", ha="center", fontsize=10, color="#b3442e")
    axes.set(xlim=(0, 13.1), ylim=(0, 3.3), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(Path(__file__).parents[1] / "encoder.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
