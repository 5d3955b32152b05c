"""What is made of the measurements: tables in Markdown, a JSON file, a chart, and the tables in the documentation.

Results are a dictionary, name of a row to what it measured, under which circumstances. Rows can be measured in several
runs: each carries its own circumstances.
"""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.operations import PARTS
from benchmarks.rows import ROWS
from benchmarks.workers import ROOT


Results = dict[str, dict[str, Any]]

PACKAGES = ("torch", "transformers", "torchvision", "pillow", "deepseek-ocr-encoder", "peft")
MARKED_SIZE = 1024
TRAINED = {"frozen": "nothing (frozen)", "clip": "CLIP only", "lora": "LoRA, rank 8", "full": "everything"}
FROZEN = {
    "projector": "encoder, language model",
    "frozen": "encoder",
    "clip": "SAM",
    "full": "nothing",
}
SURFACE, INK, MUTED, BAR, OVER, MARK = "#fcfcfb", "#1f1f1e", "#6b6a66", "#2a78d6", "#e34948", "#1f1f1e"


def environment(about: dict[str, Any], load_at_start: float | None) -> dict[str, Any]:
    """The circumstances of a measurement: machine, versions, date and revision.

    Args:
        about: What the measuring process says of itself: threads and device.
        load_at_start: What `load` gave before anything was measured.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = {"processor": _processor(), "cores": len(_cores()), "memory_bytes": _total_memory(), **about}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "date": when,
        "commit": _commit(),
        "machine": machine,
        "load_at_start": load_at_start,
        "versions": versions,
    }


def load() -> float | None:
    """How many processes have been computing in the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cores() -> set[int] | range:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _commit() -> str | None:
    """The revision of this checkout, with a plus sign if files were changed since."""
    try:
        revision, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changes else "")


# Tables


def tables(results: Results) -> dict[str, str]:
    """The tables in Markdown, by the section of the documentation that each belongs to; only of what was measured."""
    made = {section: maker(results) for section, maker in SECTIONS.items()}
    return {section: text for section, text in made.items() if text}


def _comparisons(results: Results) -> str:
    named = [(name, line) for name, result in results.items() for line in result.get("lines", ())]
    failed = [(name, result["error"]) for name, result in results.items() if "error" in result]
    if not named and not failed:
        return ""
    head = ("", "ours", "beside", "that", "result", "mark", "DeepSeek's own modules", "floor", "met")
    rows = [_comparison(line, _is_marked(results[name])) for name, line in named]
    rows += [(name, "", "", "", f"not measured: {error}", "", "", "", "") for name, error in failed]
    notes = [f"- {line['what']}, beside {line['beside']}: {line['note']}." for _, line in named if line["note"]]
    used = [name for name, result in results.items() if result.get("lines") or "error" in result]
    return "\n".join([_table(head, rows), "", *notes, *([""] if notes else []), _circumstances(results, used)])


def _comparison(line: dict[str, Any], is_marked: bool) -> tuple[str, ...]:
    if line["skipped"]:
        reason = line["skipped"].replace("|", "/")
        return (line["what"], "", line["beside"], "", f"not possible: {reason}", "", "", "", "")
    unit, value_unit = line["unit"], line["value_unit"]
    spread = f" ({_number(line['spread'][0])} to {_number(line['spread'][1])})" if line["spread"] else ""
    mark = ""
    if line["at_most"] is not None:
        mark = f"at most {_number(line['at_most'])}{_suffix(value_unit)}"
    elif line["at_least"] is not None:
        mark = f"at least {_number(line['at_least'])}{_suffix(value_unit)}"
    met = is_met(line)
    return (
        line["what"],
        f"{_number(line['ours'])} {unit}",
        line["beside"],
        f"{_number(line['theirs'])} {unit}",
        f"**{_number(line['value'])}{_suffix(value_unit)}**{spread}",
        mark,
        "" if line["own_modules"] is None else _number(line["own_modules"]),
        "" if line["floor"] is None else _number(line["floor"]),
        "" if met is None or not is_marked else "yes" if met else "no",
    )


def is_met(line: dict[str, Any]) -> bool | None:
    """Whether a comparison reaches its mark; `None` if it has none or was not measured."""
    if line["value"] is None or (line["at_most"] is None and line["at_least"] is None):
        return None
    # As it is printed: 0.604 is 0.60.
    value = round(line["value"], 2)
    return value <= round(line["at_most"], 2) if line["at_most"] is not None else value >= line["at_least"]


def _is_marked(result: dict[str, Any]) -> bool:
    """Whether it was measured under the conditions that the marks are stated for."""
    settings = result["settings"]
    return settings["size"] == MARKED_SIZE and not settings["tiny"]


def _preprocessing(results: Results) -> str:
    result = results.get("preprocessing", {})
    rates = result.get("pictures_per_second", {})
    if not rates:
        return ""
    size = result["settings"]["size"]
    rows = [(way, f"{rate:.1f}") for way, rate in rates.items()]
    rows += [
        (way, f"not possible: {reason}") for way, reason in result.get("failures", {}).items() if way not in rates
    ]
    head = (f"1,000 x 1,400 pixels to {size} x {size}", "pictures a second")
    return "\n".join([_table(head, rows), "", _circumstances(results, ["preprocessing"])])


def _profile(results: Results) -> str:
    result = results.get("profile", {})
    if "forward" not in result:
        return ""
    forward, backward, operations = result["forward"], result["backward"], result["operations"]
    totals = [sum(direction.values()) for direction in (forward, backward)]
    rows = []
    for part in PARTS:
        shares = [
            f"{100 * direction[part] / total:.0f} %"
            for direction, total in zip((forward, backward), totals, strict=True)
        ]
        counted = operations[part] / 1e9
        speeds = [f"{count * counted / direction[part]:,.0f}" for count, direction in ((1, forward), (2, backward))]
        rows.append(
            (part, f"{forward[part]:.2f}", shares[0], speeds[0], f"{backward[part]:.2f}", shares[1], speeds[1])
        )
    counted = sum(operations.values()) / 1e9
    speeds = [f"{count * counted / total:,.0f}" for count, total in zip((1, 2), totals, strict=True)]
    rows.append(("together", f"{totals[0]:.2f}", "", speeds[0], f"{totals[1]:.2f}", "", speeds[1]))
    head = ("", "forward, s", "share", "GFLOP/s", "backward, s", "share", "GFLOP/s")
    product = f"A plain matrix product in the same process: {result['operations_per_second'] / 1e9:,.0f} GFLOP/s."
    return "\n".join([_table(head, rows), "", product, "", _circumstances(results, ["profile"])])


def _matrix(results: Results) -> str:
    cells = results.get("matrix", {}).get("cells", ())
    if not cells:
        return ""
    imported = next((cell["imported"] for cell in cells if "imported" in cell), 0)
    rows, errors = [], []
    for size in dict.fromkeys(cell["size"] for cell in cells):
        for training, words in TRAINED.items():
            pair = {one["checkpointing"]: one for one in cells if (one["size"], one["training"]) == (size, training)}
            without, having = pair[False], pair.get(True)
            texts = _cell(without, imported) + (_cell(having, imported) if having else ("the same", "the same"))
            rows.append((f"{size}", words, *texts))
    for cell in (cell for cell in cells if "peak" in cell):
        errors.append((imported + cell["computed_memory"]) / cell["peak"] - 1)
    head = ("page", "trained", "GB", "s", "GB with checkpointing", "s with checkpointing")
    text = (
        "Measured, and in brackets what the formula says, with the "
        f"{imported / 1e9:.2f} GB that a process had imported; in italics what was only computed."
    )
    if errors:
        text += f" Formula against measurement: {100 * min(errors):+.0f} % to {100 * max(errors):+.0f} %."
    return "\n".join([_table(head, rows), "", text, "", _circumstances(results, ["matrix"])])


def _composite(results: Results) -> str:
    cells = results.get("composite", {}).get("cells", ())
    if not cells:
        return ""
    rows = [
        (
            f"{cell['size']}",
            FROZEN[cell["training"]],
            f"{cell['trained'] / 1e6:,.1f}",
            f"{cell['peak'] / 1e9:.2f}",
            f"{cell['seconds']:.1f}",
        )
        for cell in cells
    ]
    head = ("page", "frozen", "million parameters trained", "GB", "s")
    return "\n".join([_table(head, rows), "", _circumstances(results, ["composite"])])


def _cell(cell: dict[str, Any], imported: int) -> tuple[str, str]:
    computed = f"{(imported + cell['computed_memory']) / 1e9:.2f}"
    if "peak" in cell:
        return f"{cell['peak'] / 1e9:.2f} ({computed})", f"{cell['seconds']:.1f}"
    seconds = cell.get("computed_seconds")
    return f"*{computed}*", "" if seconds is None else f"*{seconds:.1f}*"


def _number(value: float) -> str:
    """Two decimals, or fewer of large numbers."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 20 else f"{value:.2f}"


def _suffix(unit: str) -> str:
    return "" if unit == "x" else f" {unit}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def _circumstances(results: Results, names: list[str]) -> str:
    """Under which circumstances these rows were measured, each of them once."""
    texts: dict[str, list[str]] = {}
    for name in names:
        texts.setdefault(_circumstance(results[name]), []).append(name)
    if len(texts) == 1:
        return next(iter(texts))
    return "\n".join(f"- {', '.join(rows)}: {text}" for text, rows in texts.items())


def _circumstance(result: dict[str, Any]) -> str:
    settings, around = result["settings"], result["environment"]
    machine, versions = around["machine"], around["versions"]
    on_gpu = settings["device"] == "cuda"
    parts = [
        machine.get("device", "cuda") if on_gpu else f"{machine['processor']} ({machine.get('device', '?')})",
        f"{machine['cores']} cores",
        f"{machine.get('threads', '?')} threads",
        *([f"{machine['memory_bytes'] / 1e9:.0f} GB"] if machine["memory_bytes"] else []),
        *(f"{name} {versions[name]}" for name in ("python", "torch", "transformers")),
        f"{settings['size']} x {settings['size']}",
        *(["a tiny encoder for tests"] if settings["tiny"] else []),
        f"pairs: {settings['pairs']}",
        f"seed {settings['seed']}",
        around["date"][:10],
        *([f"commit {around['commit']}"] if around["commit"] else []),
    ]
    return f"{', '.join(parts)}."


SECTIONS = {
    "rows": _comparisons,
    "preprocessing": _preprocessing,
    "profile": _profile,
    "matrix": _matrix,
    "composite": _composite,
}
"""What makes the table of each section of the documentation."""


# Files


def write_json(path: Path, results: Results) -> None:
    """Write the results, all numbers of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Results:
    """Results of earlier runs, none if there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def replace_section(text: str, section: str, content: str) -> str:
    """Put content between the marker comments `<!-- benchmarks:NAME -->` and `<!-- end of benchmarks:NAME -->`.

    Raises:
        ValueError: The text has not exactly one such pair.
    """
    begin, end = f"<!-- benchmarks:{section} -->", f"<!-- end of benchmarks:{section} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"There has to be one {begin} in the text and one {end} after it.")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def update_docs(folder: Path, results: Results) -> Results:
    """Put what was measured into the documentation; rows measured before remain, unless there is a whole one now.

    Args:
        folder: With `performance.md`, in which the marker comments are.
        results: What was measured now.

    Returns:
        All rows that the documentation has now.
    """
    earlier = read_json(folder / "benchmarks.json")
    whole = {name for name, result in results.items() if "error" not in result and not result.get("interrupted")}
    merged = earlier | {name: result for name, result in results.items() if name in whole or name not in earlier}
    merged = {name: merged[name] for name in ROWS if name in merged}
    page = folder / "performance.md"
    text = page.read_text(encoding="utf-8")
    for section, table in tables(merged).items():
        text = replace_section(text, section, table)
    write_json(folder / "benchmarks.json", merged)
    page.write_text(text, encoding="utf-8")
    draw_chart(merged, folder / "benchmarks.png")
    return merged


# Chart


def draw_chart(results: Results, path: Path) -> bool:
    """Draw the ratios as bars, with their marks, in a panel for each thing they are ratios to.

    Returns:
        Whether there was anything to draw.
    """
    marked = [
        line
        for result in results.values()
        for line in result.get("lines", ())
        if line["value_unit"] == "x" and line["value"] is not None and line["at_most"] is not None
    ]
    panels = [
        (
            "beside transformers' Unlimited-OCR, which is 1",
            [one for one in marked if one["beside"] == "Unlimited-OCR"],
        ),
        ("beside this package without it, which is 1", [one for one in marked if one["beside"] != "Unlimited-OCR"]),
    ]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(lines) + 0.9 for _, lines in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(10, 1.1 + 0.52 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        facecolor=SURFACE,
    )
    for axis, (title, lines) in zip(axes[:, 0], panels, strict=True):
        _draw_panel(axis, title, lines)
    _draw_legend(figure, axes[0, 0])
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor=SURFACE, metadata={"Software": None})
    plt.close(figure)
    return True


def _draw_panel(axis: Any, title: str, lines: list[dict[str, Any]]) -> None:
    axis.set_facecolor(SURFACE)
    axis.set_title(title, loc="left", fontsize=10, color=MUTED, pad=6)
    for place, line in enumerate(reversed(lines)):
        value, mark = line["value"], line["at_most"]
        axis.barh(place, value, height=0.5, color=BAR if is_met(line) else OVER, zorder=2)
        if line["spread"]:
            axis.plot(line["spread"], [place, place], color=INK, linewidth=1, zorder=3)
        axis.plot([mark, mark], [place - 0.36, place + 0.36], color=MARK, linewidth=2, zorder=4)
        if line["floor"] is not None:
            axis.plot(line["floor"], place, marker="D", markersize=5, color=SURFACE, markeredgecolor=INK, zorder=5)
        beyond = max(value, mark, *(line["spread"] or ()))
        axis.annotate(
            f"{value:.2f}", (beyond, place), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=10
        )
    axis.set_yticks(range(len(lines)), [_label(line) for line in reversed(lines)], fontsize=9, color=INK)
    axis.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.set_xlim(0, 1.12 * max(1, *(max(line["value"], line["at_most"]) for line in lines)))
    axis.set_ylim(-0.6, len(lines) - 0.4)
    axis.tick_params(axis="x", labelsize=8, colors=MUTED, length=0)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e6e5e1", linewidth=0.8, zorder=0)
    for side in axis.spines.values():
        side.set_visible(False)


def _label(line: dict[str, Any]) -> str:
    """The name of a comparison in two lines: which step, and time or memory of it."""
    what, _, measure = line["what"].rpartition(": ")
    return f"{what}\n{measure}"


def _draw_legend(figure: Any, axis: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=BAR, label="ratio, mark met"),
        Patch(color=OVER, label="mark not met"),
        Line2D([], [], color=INK, linewidth=1, label="lowest to highest pair"),
        Line2D([], [], color=MARK, linewidth=2, label="at most"),
        Line2D([], [], marker="D", linestyle="", color=SURFACE, markeredgecolor=INK, markersize=5, label="floor"),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.4,
    )
