"""What can be asked of an encoder's tokens, as numbers: what is alike, what attends to what, which pixels matter.

Letters in the shapes: H and W rows and columns of the token grid, N = H x W tokens, A heads, C channels, h and w rows
and columns of the pixels.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch.nn import functional as F

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import require_integer, require_number
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import at_least_float32


TokenPlace = tuple[int, int]
"""Row and column of a token, counted from 0 at the top left."""
Target = TokenPlace | Callable[[torch.Tensor], torch.Tensor]
"""What a gradient is taken of: the norm of a token, or a function from tokens [H, W, C] to a single number."""

PERCENTILES = (0.02, 0.98)
# Less than this part of the tokens' norm is rounding, not a difference between tokens.
LEAST_SPREAD = 1e-6
# On an empty page with one word nearly all tokens agree; a scale made for them alone would show their rounding.
LEAST_RANGE = 0.1


def require_token(token: Any, grid: Sequence[int]) -> TokenPlace:
    """The place of a token, as two integers within the grid."""
    is_pair = isinstance(token, tuple | list) and len(token) == 2
    if not is_pair or not all(isinstance(part, Integral) and not isinstance(part, bool) for part in token):
        raise TypeError(f"`token` is {token!r}; it has to be (row, column), two integers.")
    if not all(0 <= part < length for part, length in zip(token, grid, strict=True)):
        raise ValueError(
            f"`token` is {tuple(token)}, outside the grid; rows go from 0 to {grid[0] - 1}, columns from 0 to "
            f"{grid[1] - 1}."
        )
    return int(token[0]), int(token[1])


def pca_colors(tokens: torch.Tensor, *, on_page: torch.Tensor | None = None) -> torch.Tensor:
    """The first three principal components of the tokens as red, green and blue, as DINOv2 shows its features.

    Each component runs from 0 to 1 between its 2nd and its 98th percentile, so that single tokens do not take all of
    the contrast, or between its ends where those percentiles nearly agree. A component has no sign of its own: the
    token farthest from the mean is on the bright side. So neither a reflection nor a rotation of the tokens' space
    changes the colours. A component in which all tokens agree is 0.5. Source: arXiv 2304.07193, figure 1.

    Args:
        tokens: [H, W, C].
        on_page: [H, W], true for the tokens that decide on components and scale; by default all.

    Returns:
        [H, W, 3] in [0, 1], float32.
    """
    flat = tokens.flatten(0, 1).double()  # [N, C]
    fitted = flat if on_page is None else flat[on_page.flatten()]
    mean = fitted.mean(dim=0)
    _, spread, directions = torch.linalg.svd(fitted - mean, full_matrices=False)
    colors = flat.new_full((len(flat), 3), 0.5)
    for index, direction in enumerate(directions[:3]):
        if spread[index] > LEAST_SPREAD * fitted.norm():
            low, high = _limits((fitted - mean) @ direction)
            colors[:, index] = (((flat - mean) @ direction - low) / (high - low)).clamp(0, 1)
    return colors.view(*tokens.shape[:2], 3).float()


def cosine_similarity(tokens: torch.Tensor, token: TokenPlace) -> torch.Tensor:
    """The cosine of the angle between a token and every token.

    Args:
        tokens: [H, W, C].
        token: Row and column of the chosen one.

    Returns:
        [H, W] in [-1, 1], float32; 1 at `token`.

    Raises:
        TypeError: `token` is no pair of integers.
        ValueError: It lies outside the grid.
    """
    row, column = require_token(token, tokens.shape[:2])
    return F.cosine_similarity(tokens.float(), tokens[row, column].float().expand_as(tokens), dim=-1)


def attention_from(
    weights: torch.Tensor, grid: tuple[int, int], *, token: TokenPlace | None = None, head: int | None = None
) -> torch.Tensor:
    """How a CLIP layer divides the attention of a token among all tokens.

    Args:
        weights: [A, N, N], or [A, N + 1, N + 1] with a class token, the first.
        grid: Rows and columns of tokens.
        token: Row and column of the token that attends; `None` for the class token.
        head: Which head, counted from 0; by default the mean of all.

    Returns:
        [H, W], float32. The sum is 1, less what goes to the class token where there is one.

    Raises:
        TypeError: `token` is no pair of integers.
        ValueError: It lies outside the grid, or is `None` and there is no class token, or there is no such head.
    """
    num_heads, num_class_tokens = len(weights), weights.shape[-1] - grid[0] * grid[1]
    if head is not None and not 0 <= head < num_heads:
        raise ValueError(f"`head` is {head!r}; heads go from 0 to {num_heads - 1}, and `None` is the mean of all.")
    if token is None and not num_class_tokens:
        raise ValueError("`token` is None, but this encoder has no class token; choose a token by (row, column).")
    query = 0
    if token is not None:
        row, column = require_token(token, grid)
        query = num_class_tokens + row * grid[1] + column
    attention = weights[:, query].float().mean(0) if head is None else weights[head, query].float()
    return attention[num_class_tokens:].view(grid)


def pixel_gradient(
    model: Any, pixel_values: torch.Tensor, target: Target, *, num_samples: int = 0, noise: float = 0.15, seed: int = 0
) -> torch.Tensor:
    """The gradient of a number made of the tokens, with respect to the pixels of a page.

    The model stays as it is: no weight gets a `.grad`, and a frozen model serves as well.

    Args:
        model: A `DeepSeekOCRVisionModel`.
        pixel_values: [3, h, w], normalised.
        target: What the gradient is taken of: (row, column) for the norm of that token, or a function that is given
            the tokens, [H, W, C] in the model's dtype, and returns a tensor with one number, such as a loss.
        num_samples: How many noisy copies of the page to take the mean over (SmoothGrad, arXiv 1706.03825); with 0
            the page itself, once.
        noise: Standard deviation of that noise, as a part of the range of `pixel_values`.
        seed: What the noise is drawn from.

    Returns:
        [3, h, w], float32 (float64 if `pixel_values` is), signed, of the normalised pixels.

    Raises:
        TypeError: `target` is neither, or the function returns no tensor.
        ValueError: The token lies outside the grid, `num_samples` or `noise` is negative, the function returns more
            than one number or one that does not depend on the tokens, or the gradient is not finite.
    """
    require_integer("num_samples", num_samples, at_least=0)
    require_number("noise", noise, at_least=0)
    pages = _noisy_copies(pixel_values, num_samples, noise, seed) if num_samples else [pixel_values]
    with evaluating(model):
        gradients = (_gradient(model, page, target) for page in pages)
        gradient = functools.reduce(torch.add, gradients) / max(1, num_samples)
    if not gradient.isfinite().all():
        raise ValueError(f"The gradient holds NaN or infinity; the model computes in {model.dtype}.")
    return gradient


def strength(gradient: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
    """One number a pixel out of its three: the largest magnitude of a channel's gradient (arXiv 1312.6034).

    Args:
        gradient: [3, h, w].
        pixel_values: [3, h, w], to take the magnitude of gradient times input instead, summed over the channels
            (arXiv 1605.01713).

    Returns:
        [h, w], at least 0.
    """
    return gradient.abs().amax(0) if pixel_values is None else (gradient * pixel_values).sum(0).abs()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into the mode that it was in.

    An adapter's dropout would draw a new image each time, and reentrant gradient checkpointing, which is for
    training alone, refuses to differentiate with respect to pixels.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


def on_grid(tokens: torch.Tensor, pixel_values: torch.Tensor, token_size: int) -> torch.Tensor:
    """The tokens of one page, [N, C], in rows and columns, [H, W, C], without the special tokens of a sequence."""
    rows, columns = (side // token_size for side in pixel_values.shape[-2:])
    if len(tokens) == rows * (columns + 1) + 1:
        # The released sequence: a newline ends each row, a separator the page.
        tokens = tokens[:-1].unflatten(0, (rows, columns + 1))[:, :columns].flatten(0, 1)
    if len(tokens) != rows * columns:
        raise ValueError(
            f"The model gives {len(tokens)} tokens for a page of {rows} x {columns} squares; what is drawn here needs "
            "one token a square."
        )
    return tokens.view(rows, columns, -1)


def _limits(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of a component's values, [N], is dark, and which is bright: that nearer to the farthest token."""
    low, high = torch.quantile(scores, scores.new_tensor(PERCENTILES))
    least, most = scores.min(), scores.max()
    if high - low < LEAST_RANGE * (most - least):
        low, high = least, most
    return (high, low) if -least > most else (low, high)


def _noisy_copies(pixel_values: torch.Tensor, number: int, noise: float, seed: int) -> Iterator[torch.Tensor]:
    # Drawn on the CPU, so that a seed gives the same noise on every device.
    generator = torch.Generator().manual_seed(seed)
    deviation = noise * (pixel_values.max() - pixel_values.min())
    for _ in range(number):
        drawn = torch.randn(pixel_values.shape, generator=generator, dtype=pixel_values.dtype)
        yield pixel_values + deviation * drawn.to(pixel_values.device)


def _gradient(model: Any, pixel_values: torch.Tensor, target: Target) -> torch.Tensor:  # [3, h, w] -> [3, h, w]
    # Whoever draws images is often under `no_grad` or `inference_mode`; the gradient is wanted even so.
    with torch.inference_mode(False), torch.enable_grad():
        pixels = pixel_values.detach().to(at_least_float32(pixel_values.dtype), copy=True).requires_grad_()
        tokens = model(pixel_values=pixels[None], return_dict=True).last_hidden_state[0]  # [N, C]
        number = _number(target, on_grid(tokens, pixels, model.config.patch_size))
        gradient = None
        if number.requires_grad:
            # Of the pixels alone: `backward` would add to the weights' gradients, which an optimizer may wait for.
            (gradient,) = torch.autograd.grad(number, pixels, allow_unused=True)
    if gradient is None:
        raise ValueError("`target` gives a number that does not depend on the tokens, so there is no gradient.")
    return gradient


def _number(target: Target, tokens: torch.Tensor) -> torch.Tensor:  # [H, W, C] -> []
    if not callable(target):
        row, column = require_token(target, tokens.shape[:2])
        return tokens[row, column].to(torch.promote_types(tokens.dtype, torch.float32)).norm()
    number = target(tokens)
    if not isinstance(number, torch.Tensor):
        raise TypeError(f"`target` has to return a tensor with one number, but returned a {type(number).__name__}.")
    if number.numel() != 1:
        raise ValueError(f"`target` has to return one number, but returned a tensor of {list(number.shape)}.")
    return number.squeeze()
