"""Where gradients arrive and where they do not, layer group by layer group, and in words why.

A model that does not train rarely says so: a `no_grad` on the way, a batch whose labels are all ignored or an encoder
left frozen give a loss all the same. The report counts what a backward pass left in every group, from the pixels to
the loss, and names the place where the path breaks.
"""

import math
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

from deepseek_ocr_vision.configuration.extras import require

from .gradient_problems import notes_of, problems_of
from .gradient_rows import GradientRow, State, gradient_row, layer_groups, local_part


COLUMNS = ("layer group", "trainable", "with gradient", "zero", "missing", "non-finite", "norm")

# Colour and shape of a state's mark, so that either of the two tells.
MARKS: dict[State, tuple[str, str]] = {
    "with gradient": ("#1f5fa8", "o"),
    "zero": ("#d9822b", "v"),
    "missing": ("#c62828", "X"),
    "non-finite": ("#8e24aa", "*"),
    "frozen": ("#9e9e9e", "s"),
}


@dataclass(frozen=True)
class GradientReport:
    """What `gradient_report` found; as text a table with the problems below it.

    Attributes:
        rows: The layer groups, in the order of the data.
        problems: What is wrong, in sentences, the cause before its consequences; empty if nothing is.
        notes: What is unusual and may be meant so.
    """

    rows: list[GradientRow]
    problems: list[str]
    notes: list[str]

    def raise_for_problems(self) -> None:
        """Stop if something is wrong.

        Raises:
            RuntimeError: With all problems; PyTorch's own errors about gradients are of this class.
        """
        if self.problems:
            raise RuntimeError("\n".join(self.problems))

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the norms of all groups, in the order of the data, and mark what has none.

        Args:
            path: The image, such as `gradient_flow.png`; its ending says the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        _draw(self.rows, path)

    def __str__(self) -> str:
        problems = ["Problems:", *map(_bullet, self.problems)] if self.problems else ["No problems."]
        notes = ["", "Notes:", *map(_bullet, self.notes)] if self.notes else []
        return "\n".join([*_table(self.rows), "", *problems, *notes])


def gradient_report(
    model: nn.Module, loss: torch.Tensor | None = None, *, raise_on_problems: bool = False
) -> GradientReport:
    """Say where the gradients of a backward pass arrived, and what is wrong where they did not.

    Call it between `loss.backward()` and `zero_grad()`, or give it a loss that has not been backpropagated: then it
    calls `loss.backward()` itself, and the gradients stay, ready for a step of the optimizer. Only then can it tell
    the gradients of this loss from those that an earlier step left. A loss that was backpropagated is left alone; one
    whose graph was retained cannot be told from a new one.

    Parameters that modules share count once, where the data meets them first. Norms are those of the gradients as
    they are, so unscale those of a `GradScaler` first. One tensor at a time is looked at, in float32 or better. Where
    FSDP2 has cut gradients into pieces, norms are put together, so every process has to call this. DeepSpeed's ZeRO
    keeps gradients where this does not look: to it all are missing.

    Args:
        model: Any module. Of our encoders in it, alone or within a composite, wrapped or not, the rows are their
            `layer_groups()`; elsewhere the items of lists of layers, and whole modules where there are no lists.
            Encoders come first, the rest as it was registered.
        loss: One number, or `None` to report the gradients that there are.
        raise_on_problems: Whether to raise if something is wrong.

    Returns:
        Rows, problems and notes; its text shows all three.

    Raises:
        TypeError: `model` is no module, or `loss` is no tensor.
        ValueError: `loss` is not one number.
        RuntimeError: There are problems and `raise_on_problems` is true.
    """
    _check_arguments(model, loss)
    stale, notes = _backpropagate(model, loss)
    # Only now: between forward and backward FSDP2 has other parameters in the place of those that get the gradients.
    groups = layer_groups(model)
    parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
    rows = [gradient_row(group, stale) for group in groups]
    problems = problems_of(rows, parameters, loss=loss, stale=stale)
    report = GradientReport(rows, problems, [*notes_of(rows), *notes])
    if raise_on_problems:
        report.raise_for_problems()
    return report


def _check_arguments(model: Any, loss: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` has to be a torch.nn.Module, got a {type(model).__name__}.")
    if loss is not None and not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"`loss` has to be a torch.Tensor or None, got a {type(loss).__name__}; a model's output holds its loss "
            "as `.loss`."
        )
    if loss is not None and loss.numel() != 1:
        raise ValueError(f"`loss` has to be one number, got shape {list(loss.shape)}; take its mean or its sum.")


# The backward pass


def _backpropagate(model: nn.Module, loss: torch.Tensor | None) -> tuple[frozenset[int], list[str]]:
    """Run the backward pass of a loss that can have one and has had none.

    Returns:
        Which gradients, by their parameter's `id`, it did not add to, and notes about it.
    """
    if loss is None or loss.grad_fn is None or _is_spent(loss):
        return frozenset(), []
    earlier = _versions(model)
    loss.backward()
    now = _versions(model)
    stale = frozenset(key for key, version in earlier.items() if now.get(key) == version)
    note = "There were gradients already, and this loss's were added to them, as in gradient accumulation."
    return stale, [note] if earlier else []


def _versions(model: nn.Module) -> dict[int, tuple[int, int]]:
    """What changes when a gradient is added to, by its parameter's `id`: autograd counts the changes of a tensor."""
    versions = {}
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            # FSDP2 adds to this process's piece, which the whole does not notice.
            versions[id(parameter)] = (id(parameter.grad), local_part(parameter.grad)._version)
    return versions


def _is_spent(loss: torch.Tensor) -> bool:
    """Whether a loss was backpropagated: autograd has freed what it saved then, and raises when asked for it.

    Only the first node that saved a tensor is asked. The others may have to compute again what they saved.
    """
    for node in _nodes(loss.grad_fn):
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                try:
                    saved = getattr(node, name)
                except RuntimeError:
                    return True
                if any(isinstance(value, torch.Tensor) for value in (saved if isinstance(saved, tuple) else (saved,))):
                    return False
    return False


def _nodes(root: Any) -> Iterator[Any]:
    """The nodes of a graph, those near the loss first."""
    seen, level = set(), [root]
    while level:
        yield from level
        seen.update(level)
        following = dict.fromkeys(node for parent in level for node, _ in parent.next_functions)
        level = [node for node in following if node is not None and node not in seen]


# Text


def _table(rows: list[GradientRow]) -> list[str]:
    """The rows as lines of text, in columns."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]) for name, *numbers in cells]


def _cells(row: GradientRow) -> tuple[str, ...]:
    counts = (row.trainable, *map(len, (row.with_gradient, row.zero, row.missing, row.non_finite)))
    norm = "frozen" if row.state == "frozen" else "none" if row.is_unreached else f"{row.norm:.1e}"
    return (row.name, *(str(count) if count else "-" for count in counts), norm)


def _bullet(sentence: str) -> str:
    lines = textwrap.wrap(sentence, 98, break_long_words=False, break_on_hyphens=False)
    return "- " + "\n  ".join(lines)


# Image


def _draw(rows: list[GradientRow], path: str | os.PathLike) -> None:
    """Draw a line a group, the pixels at the top: its norm, or beside the scale a mark of what is in its place."""
    matplotlib = require("matplotlib.figure", "`plot`", extra="train")
    figure = matplotlib.Figure(figsize=(8, 1.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    _set_scale(axes, rows)
    _shade_encoders(axes, rows)
    for state in MARKS:
        _draw_state(axes, rows, state)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize="small")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("norm of the gradient", fontsize="small")
    # Turned, it reads from the loss to the pixels, and its arrow points there.
    axes.set_ylabel("backward pass  \N{RIGHTWARDS ARROW}", fontsize="small")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="x", labelsize="small")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=len(MARKS), frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def _set_scale(axes: Any, rows: list[GradientRow]) -> None:
    """A logarithmic scale with room on the left for what has no norm, on the right for what has no finite one."""
    exponents = [math.log10(row.norm) for row in rows if _has_norm(row)] or [0.0]
    lowest, highest = math.floor(min(exponents)), math.ceil(max(exponents))
    room = 0.1 * max(highest - lowest, 1)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (lowest - room), 10 ** (highest + room))


def _has_norm(row: GradientRow) -> bool:
    return math.isfinite(row.norm) and row.norm > 0


def _shade_encoders(axes: Any, rows: list[GradientRow]) -> None:
    """Mark which of the groups are an encoder's."""
    color = MARKS["with gradient"][0]
    for encoder, run in groupby(enumerate(rows), key=lambda pair: pair[1].encoder):
        if encoder is not None:
            indices = [index for index, _ in run]
            axes.axhspan(indices[0] - 0.5, indices[-1] + 0.5, color=color, alpha=0.06, linewidth=0)
            style = {"color": color, "fontsize": "small", "rotation": "vertical", "ha": "left", "va": "center"}
            middle = (indices[0] + indices[-1]) / 2
            axes.text(1.01, middle, "encoder", transform=axes.get_yaxis_transform(), **style)


def _draw_state(axes: Any, rows: list[GradientRow], state: State) -> None:
    """Draw all groups of one state, at their norms or beside the scale."""
    color, marker = MARKS[state]
    style = {"linestyle": "none", "color": color, "marker": marker, "markersize": 7}
    placed = [(index, row) for index, row in enumerate(rows) if row.state == state]
    inside = [(row.norm, index) for index, row in placed if _has_norm(row)]
    beside = [(0.97 if row.non_finite else 0.03, index) for index, row in placed if not _has_norm(row)]
    for norm, index in inside:
        axes.plot([axes.get_xlim()[0], norm], [index, index], color=color, alpha=0.35, linewidth=2)
    for points, transform in ((inside, axes.transData), (beside, axes.get_yaxis_transform())):
        if points:
            axes.plot(*zip(*points, strict=True), transform=transform, **style)
    if placed:
        axes.plot([], [], label=state, **style)
