"""loss.png: the losses of all runs over the steps, and their learning rates."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import COLORS, save_figure

from finetuning.scores import RunResult


def draw_losses(results: list[RunResult], path: Path) -> None:
    """Draw the losses, thin on training batches and with dots on held-out pages, and below them the learning rate."""
    has_rates = any(result.curve("learning_rate")[0] for result in results)
    figure = Figure(figsize=(7, 5.4 if has_rates else 4), layout="constrained")
    rows = figure.subplots(2 if has_rates else 1, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + has_rates])
    losses = rows[0, 0]
    for result, color in zip(results, COLORS, strict=False):
        run = f"encoder {result.name}"
        losses.plot(*result.curve("loss"), color=color, alpha=0.45, label=f"{run}, training pages")
        losses.plot(*result.curve("eval_loss"), "o-", color=color, ms=4, label=f"{run}, held-out pages")
        if has_rates:
            rows[1, 0].plot(*result.curve("learning_rate"), color=color)
    if len(results) == 1:
        saved = results[0]
        losses.plot([saved.step], [saved.loss], "*", color="black", ms=9, label="the saved model")
    label_losses(losses)
    if has_rates:
        rows[1, 0].set(ylabel="learning rate", ylim=(0, None))
        rows[1, 0].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rows[1, 0].grid(alpha=0.2)
    rows[-1, 0].set(xlabel="step")
    rows[-1, 0].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    save_figure(figure, path)


def label_losses(axes: Axes) -> None:
    """A logarithmic axis where the losses span much, with plain numbers at every tick."""
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    is_wide = bool(values) and max(values) > 4 * min(values)
    axes.set(ylabel="cross entropy, nats a token", yscale="log" if is_wide else "linear")
    if is_wide:
        axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize="small")
