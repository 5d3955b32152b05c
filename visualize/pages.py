"""One page as an encoder sees it: a single forward pass, and the images that are made of it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.configuration.extras import require
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import input_device
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import read_image
from deepseek_ocr_vision.saving.staging import staging_folder
from deepseek_ocr_vision.visualize.maps import (
    Target,
    TokenPlace,
    attention_from,
    cosine_similarity,
    evaluating,
    on_grid,
    pca_colors,
    pixel_gradient,
    require_token,
    strength,
)


Colormap = Literal["viridis", "magma"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""

FRAME = "#d6002a"

# A few pixels at the edges of letters have gradients many times those of all others. Those that hold this part of the
# sum get one colour. A part of the pixels would not do: on a large page all that a token depends on is few of them.
CUT_OFF = 0.1


@dataclass(frozen=True, eq=False)
class PageMap:
    """Something that was asked of a page: the numbers, and how they are drawn over it.

    Attributes:
        values: Over all that the encoder read, margins included: [H, W], one a token, or [h, w], one a pixel; or
            [H, W, 3], colours in [0, 1].
        view: The page.
        title: What the numbers are, in words.
        colormap: matplotlib's name of the colours.
        limits: The numbers at both ends of the colours; what lies beyond is drawn as the end.
        alpha: How much of the page's place the colours take, from 0 to 1.
        token: Row and column of the token that it is about, which gets a frame.
    """

    values: np.ndarray
    view: "PageView"
    title: str
    colormap: Colormap = "viridis"
    limits: tuple[float, float] = (0.0, 1.0)
    alpha: float = 0.6
    token: TokenPlace | None = None

    def draw(self, *, alpha: float | None = None, limits: tuple[float, float] | None = None) -> Image.Image:
        """Draw the numbers over the page.

        Args:
            alpha: How much the colours take of the page's place, from 0, the page in grey, to 1, nothing of it.
            limits: Other ends of the colours than `self.limits`, such as those of an image to compare with.

        Returns:
            An image in RGB, as large as the page. A token is a rectangle of one colour; numbers one a pixel are
            interpolated where the page is of another size than what the encoder read.

        Raises:
            ImportError: matplotlib, which has the colours, is not installed; the colours of PCA need none.
            ValueError: `alpha` is not in [0, 1].
        """
        alpha = self.alpha if alpha is None else alpha
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` is {alpha!r}; it has to be between 0 and 1.")
        colors = self._colors(self.limits if limits is None else limits)
        page = self.view.page.convert("L").convert("RGB")
        image = Image.blend(page, self._over_page(colors), alpha)
        if self.token is not None:
            draw_frame(image, self.view.box(self.token))
        return image

    def save(self, path: str | os.PathLike, **options: Any) -> None:
        """Write the image to a file, in one step; its suffix says in which format.

        Args:
            path: Such as `"similarity.png"`. What is there is replaced.
            options: As `draw` takes them.
        """
        save_image(self.draw(**options), path)

    def _colors(self, limits: tuple[float, float]) -> np.ndarray:
        """The numbers as colours, uint8 [H, W, 3]."""
        if self.values.ndim == 3:
            return np.rint(self.values * 255).astype(np.uint8)
        low, high = limits
        # All numbers are equal on a page of one colour.
        parts = (self.values - low) / ((high - low) or 1.0)
        return colormap(self.colormap)(parts, bytes=True)[..., :3]

    def _over_page(self, colors: np.ndarray) -> Image.Image:
        """The part of the colours that lies on the page, as large as it."""
        height, width = self.view.pixel_values.shape[-2:]
        rows, columns = colors.shape[:2]
        left, top, right, bottom = self.view.place
        box = (left * columns / width, top * rows / height, right * columns / width, bottom * rows / height)
        is_one_a_token = (rows, columns) == self.view.grid
        resample = Image.Resampling.NEAREST if is_one_a_token else Image.Resampling.BILINEAR
        return Image.fromarray(np.ascontiguousarray(colors)).resize(self.view.page.size, resample, box=box)


@dataclass(frozen=True, eq=False)
class PageView:
    """One page as an encoder sees it, as `view_page` makes it.

    Attributes:
        model: The encoder.
        page: The page in RGB and upright, in its own size.
        pixel_values: What the encoder read, [3, h, w].
        place: Left, top, right and bottom of the page on `pixel_values`; a preset that pads leaves a margin.
        tokens: [H, W, C], float32, on the CPU.
        attentions: The weights of each CLIP layer, [A, N, N], with a class token [A, N + 1, N + 1], on the CPU.
    """

    model: Any
    page: Image.Image
    pixel_values: torch.Tensor
    place: tuple[int, int, int, int]
    tokens: torch.Tensor
    attentions: tuple[torch.Tensor, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens, those on a margin included."""
        rows, columns, _ = self.tokens.shape
        return rows, columns

    @property
    def on_page(self) -> torch.Tensor:
        """Which tokens have something of the page on their square, [H, W]."""
        return self._squares(self._is_page()).any(dim=-1)

    def token_at(self, x: float, y: float) -> TokenPlace:
        """Row and column of the token whose square a pixel of the page lies in.

        Args:
            x: Pixels from the page's left edge.
            y: Pixels from its top edge.

        Raises:
            ValueError: The pixel is not on the page.
        """
        width, height = self.page.size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"`x`, `y` is {x!r}, {y!r}; the page is {width} pixels wide and {height} high.")
        left, top, right, bottom = self.place
        side = self.model.config.patch_size
        row, column = (top + y * (bottom - top) / height) / side, (left + x * (right - left) / width) / side
        return int(row), int(column)

    def box(self, token: TokenPlace) -> Box:
        """Left, top, right and bottom, on the page, of a token's square; empty if nothing but margin is there."""
        row, column = require_token(token, self.grid)
        left, top, right, bottom = self.place
        side = self.model.config.patch_size
        width, height = self.page.size
        across = [(x * side - left) * width / (right - left) for x in (column, column + 1)]
        down = [(y * side - top) * height / (bottom - top) for y in (row, row + 1)]
        horizontal, vertical = np.clip(across, 0, width).tolist(), np.clip(down, 0, height).tolist()
        return horizontal[0], vertical[0], horizontal[1], vertical[1]

    def richest_token(self) -> TokenPlace:
        """The token with the most on its square: the one where brightness varies most, margins left out."""
        brightness = self._squares(self.pixel_values.float().mean(0).cpu())  # [H, W, pixels]
        is_page = self._squares(self._is_page())
        mean = (brightness * is_page).sum(-1, keepdim=True) / is_page.sum(-1, keepdim=True).clamp(min=1)
        variation = ((brightness - mean).square() * is_page).sum(-1)  # [H, W]
        return divmod(int(variation.argmax()), self.grid[1])

    def pca(self) -> PageMap:
        """The tokens as colours: their first three principal components; see `pca_colors`.

        Alike colours are alike tokens. Components are those of the tokens on the page, not of those on a margin.
        """
        colors = pca_colors(self.tokens, on_page=self.on_page).numpy()
        return PageMap(colors, self, "tokens: first three principal components")

    def similarity(self, token: TokenPlace) -> PageMap:
        """The cosine between a token and every token, in [-1, 1].

        The colours go from the least similar token on the page to 1.

        Args:
            token: Row and column.
        """
        values = cosine_similarity(self.tokens, token)
        limits = (values[self.on_page].min().item(), 1.0)
        return PageMap(values.numpy(), self, "cosine similarity to the token", limits=limits, token=token)

    def attention(self, token: TokenPlace | None = None, *, layer: int = -1, head: int | None = None) -> PageMap:
        """How a layer of the CLIP stage divides a token's attention among all tokens.

        Args:
            token: Row and column of the token that attends; `None` for the class token, where there is one.
            layer: Which layer, counted from 0, or from -1 backwards.
            head: Which head, counted from 0; by default the mean of all.

        Raises:
            TypeError: `token` is no pair of integers.
            ValueError: There is no such token, layer or head.
        """
        number = len(self.attentions)
        if not -number <= layer < number:
            raise ValueError(f"`layer` is {layer!r}; CLIP layers go from 0 to {number - 1}, or from {-number} to -1.")
        values = attention_from(self.attentions[layer], self.grid, token=token, head=head)
        heads = "mean of heads" if head is None else f"head {head}"
        source = "the class token" if token is None else "the token"
        title = f"attention of {source}: CLIP layer {layer % number}, {heads}"
        return PageMap(values.numpy(), self, title, limits=(0.0, values.max().item()), token=token)

    def pixel_gradient(self, target: Target, *, times_input: bool = False, **options: Any) -> PageMap:
        """What a token or a loss depends on: the magnitude of its gradient with respect to each pixel.

        `pixel_gradient`, the function, gives the gradient itself, with its sign and for each channel.

        Args:
            target: (row, column) for the norm of that token, or a function that is given the tokens [H, W, C] and
                returns one number, such as the product with a direction, or a loss.
            times_input: Whether to take gradient times input: by how much a pixel counts, not how sensitive it is.
            options: `num_samples`, `noise` and `seed`, as that function takes them, for the mean over noisy copies.

        Raises:
            TypeError: `target` is neither, or the function returns no tensor.
            ValueError: There is no such token, or the function returns what has no gradient; see `pixel_gradient`.
        """
        gradient = pixel_gradient(self.model, self.pixel_values, target, **options)
        values = strength(gradient, self.pixel_values if times_input else None).float().cpu()
        token = None if callable(target) else target
        what = "the number" if token is None else "the token's norm"
        title = f"pixels that {what} depends on: gradient" + " x input" * times_input
        return PageMap(values.numpy(), self, title, "magma", (0.0, _highest(values)), 0.8, token)

    def _is_page(self) -> torch.Tensor:
        """Which pixels that the encoder read are the page, [h, w]; the others are a margin."""
        is_page = torch.zeros(self.pixel_values.shape[-2:], dtype=torch.bool)
        left, top, right, bottom = self.place
        is_page[top:bottom, left:right] = True
        return is_page

    def _squares(self, pixels: torch.Tensor) -> torch.Tensor:  # [h, w] -> [H, W, pixels of a token]
        side = self.model.config.patch_size
        return pixels.unfold(0, side, side).unfold(1, side, side).flatten(2)


def view_page(model: Any, image: Any, *, image_processor: Any = None) -> PageView:
    """Show an encoder a page, once, and keep what its images are made of.

    Args:
        model: A `DeepSeekOCRVisionModel`, in any feature mode and dtype, on any device. It stays as it is.
        image: One image: a path, a PIL image, an array or a tensor.
        image_processor: What prepares it, as for `model.encode`: by default the one saved with the checkpoint or, for
            a model that has none, the preset that belongs to its feature mode at `config.image_size`. Where it cuts
            a page into tiles as well, the view of the whole page is what is shown.

    Raises:
        TypeError: `model` is something else, or `image` is no image.
        ValueError: The image cannot be read as it stands, or the tokens are not finite.
        OSError: A file that is missing, truncated or no image.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != DeepSeekOCRVisionConfig.model_type:
        raise TypeError(f"`model` has to be a DeepSeekOCRVisionModel, got a {type(model).__name__}.")
    image_processor = model.default_image_processor() if image_processor is None else image_processor
    # A processor as `AutoProcessor` gives it has the image processor inside.
    image_processor = getattr(image_processor, "image_processor", image_processor)
    page: Any = read_image(image, "image", input_data_format=None, do_convert_rgb=True, keeps_tensor=False)[0]
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"].to(input_device(model))
    with torch.no_grad(), evaluating(model):
        outputs = model(pixel_values=pixel_values, output_attentions=True, return_dict=True)
    tokens = on_grid(outputs.last_hidden_state[0], pixel_values, model.config.patch_size).float().cpu()
    if not tokens.isfinite().all():
        raise ValueError(f"The tokens hold NaN or infinity; the model computes in {model.dtype}.")
    attentions = tuple(weights[0].cpu() for weights in outputs.attentions)
    top, left = 0, 0
    height, width = pixel_values.shape[-2:]
    if image_processor.do_resize:
        top, left, height, width = image_processor.placement(page.height, page.width)
    place = (left, top, left + width, top + height)
    return PageView(model, page, pixel_values[0], place, tokens, attentions)


def colormap(name: Colormap) -> Any:
    """matplotlib's colours of a name."""
    return require("matplotlib", "Drawing", extra="train").colormaps[name]


def draw_frame(image: Image.Image, box: Box) -> None:
    """Draw a frame around a box, white on its outside, so that it shows on any image."""
    left, top, right, bottom = map(round, box)
    if right <= left or bottom <= top:
        return
    line = max(1, round(max(image.size) / 300))
    draw = ImageDraw.Draw(image)
    for outset, color in ((2 * line, "white"), (line, FRAME)):
        corners = (left - outset, top - outset, right - 1 + outset, bottom - 1 + outset)
        draw.rectangle(corners, outline=color, width=line)


def require_image_suffix(path: str | os.PathLike) -> None:
    """Make sure that a file's name says which format an image is written in."""
    suffix = Path(path).suffix.lower()
    if suffix not in Image.registered_extensions():
        raise ValueError(f"{os.fspath(path)} ends in {suffix!r}, which is no image format; take '.png'.")


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Write an image atomically: what was at `path` stays until the new one is complete."""
    require_image_suffix(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(path.parent) as folder:
        partial = folder / path.name
        try:
            image.save(partial)
            os.replace(partial, path)
        except OSError as error:  # of a disk that is full it names no file
            raise OSError(f"{path} could not be written: {error}") from error


def _highest(values: torch.Tensor) -> float:
    """The value above which `CUT_OFF` of the sum of all values lies."""
    descending = values.double().flatten().sort(descending=True).values
    sums = descending.cumsum(0)
    return descending[(sums < CUT_OFF * sums[-1]).sum()].item()
