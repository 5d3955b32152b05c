"""What is made of the measurements: tables in Markdown, a JSON file, a chart, and the tables in the documentation.

Results are a dictionary, from the name of a row to what it measured and under which circumstances; rows of one file
may come from several runs.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.rows import DEEPSEEK_OCR_ENCODER, ROWS, UNLIMITED_OCR


Results = dict[str, dict[str, Any]]

PEERS = (UNLIMITED_OCR, DEEPSEEK_OCR_ENCODER)
TRAINED = {"frozen": "nothing (frozen)", "clip": "CLIP only", "lora": "LoRA, rank 8", "full": "everything"}
FROZEN = {"projector": "encoder, language model", "frozen": "encoder", "clip": "SAM", "full": "nothing"}
SURFACE, INK, MUTED, GRID, BAR = "#fcfcfb", "#1f1f1e", "#6b6a66", "#e6e5e1", "#2a78d6"


# Tables


def tables(results: Results) -> dict[str, str]:
    """The tables in Markdown, by the section of the documentation that each belongs to; only of what was measured."""
    made = {section: maker(results) for section, maker in SECTIONS.items()}
    return {section: text for section, text in made.items() if text}


def _comparisons(results: Results) -> str:
    rows = []
    for name, result in results.items():
        rows += [_comparison(one) for one in result.get("comparisons", ())]
        if "error" in result:
            rows.append((name, "", "", "", _not_measured(result["error"])))
    return _table(("", "result", "baseline", "its result", "ratio"), rows)


def _comparison(one: dict[str, Any]) -> tuple[str, ...]:
    if one["skipped"]:
        return one["what"], "", one["baseline"], "", _not_measured(one["skipped"])
    value, baseline_value = (f"{_number(one[name])} {one['unit']}" for name in ("value", "baseline_value"))
    ratio = "" if one["ratio"] is None else f"**{_number(one['ratio'])}**"
    spread = f" ({_number(one['spread'][0])} to {_number(one['spread'][1])})" if one["spread"] else ""
    return one["what"], value, one["baseline"], baseline_value, ratio + spread


def _preprocessing(results: Results) -> str:
    result = results.get("preprocessing", {})
    rates = result.get("images_per_second", {})
    rows = [(way, f"{rate:.1f}") for way, rate in rates.items()]
    rows += [(way, _not_measured(error)) for way, error in result.get("failures", {}).items() if way not in rates]
    return _table(("way", "images per second"), rows)


def _profile(results: Results) -> str:
    result = results.get("profile", {})
    parts = result.get("operations", {})
    rows = [(part, *_part_cells(result, part, "forward"), *_part_cells(result, part, "backward")) for part in parts]
    if parts:
        rows.append(("matrix product", "", "", f"{result['operations_per_second'] / 1e9:,.0f}", "", "", ""))
    return _table(("part", "forward", "share", "GFLOP/s", "backward", "share", "GFLOP/s"), rows)


def _part_cells(result: dict[str, Any], part: str, direction: str) -> tuple[str, str, str]:
    seconds, total = result[direction][part], sum(result[direction].values())
    # A backward pass takes twice the operations of the forward pass.
    operations = result["operations"][part] * (2 if direction == "backward" else 1)
    return f"{seconds:.2f} s", f"{100 * seconds / total:.0f} %", f"{operations / 1e9 / seconds:,.0f}"


def _matrix(results: Results) -> str:
    return _by_size(results, "matrix", "trained", TRAINED)


def _composite(results: Results) -> str:
    return _by_size(results, "composite", "frozen", FROZEN)


def _by_size(results: Results, name: str, head: str, labels: dict[str, str]) -> str:
    """Peak memory and time of the jobs of a row, with a column for each size of the page."""
    cells = results.get(name, {}).get("cells", ())
    sizes = dict.fromkeys(cell["size"] for cell in cells)
    trained = {cell["training"]: f" ({cell['trained'] / 1e6:,.1f} M trained)" for cell in cells if "trained" in cell}
    rows: dict[str, dict[int, str]] = {}
    for cell in cells:
        label = labels[cell["training"]] + trained.get(cell["training"], "")
        label += ", checkpointing" if cell["checkpointing"] else ""
        rows.setdefault(label, dict.fromkeys(sizes, ""))[cell["size"]] = _cell(cell)
    lines = [(label, *texts.values()) for label, texts in rows.items()]
    return _table((head, *(f"{size} x {size}" for size in sizes)), lines)


def _cell(cell: dict[str, Any]) -> str:
    if "skipped" in cell:
        return _not_measured(cell["skipped"])
    return f"{cell['peak'] / 1e9:.2f} GB, {cell['seconds']:.1f} s"


def _not_measured(reason: str) -> str:
    return f"not measured: {reason}".replace("|", "/")


def _number(value: float) -> str:
    """Two decimals, or fewer of large numbers."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 20 else f"{value:.2f}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown; nothing if it has no rows."""
    lines = [" | ".join(line) for line in (head, ("---",) * len(head), *rows)]
    return "\n".join(f"| {line} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines) if rows else ""


def _machines(results: Results) -> str:
    """Under which circumstances the rows were measured, each of them once."""
    texts: dict[str, list[str]] = {}
    for name, result in results.items():
        texts.setdefault(_circumstances(result), []).append(name)
    return "\n".join(f"- `--rows {','.join(names)}`: {text}" for text, names in texts.items())


def _circumstances(result: dict[str, Any]) -> str:
    settings, around = result["settings"], result["environment"]
    machine, versions = around["machine"], around["versions"]
    device = machine.get("device", "?")
    if machine.get("emulated"):
        device += f", which emulates {' and '.join(machine['emulated'])}"
    parts = [
        device if settings["device"] == "cuda" else f"{machine['processor']} ({device})",
        f"{machine['cores']} cores",
        f"{machine.get('threads', '?')} threads",
        f"{machine['memory_bytes'] / 1e9:.0f} GB",
        *(f"{name} {versions[name]}" for name in ("python", "torch", "transformers")),
        f"{settings['size']} x {settings['size']}",
        *(["a tiny encoder for tests"] if settings["tiny"] else []),
        f"pairs: {settings['pairs']}",
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
    "machines": _machines,
}
EMULATED = "-emulated"
PLACES = {"": tuple(SECTIONS), EMULATED: ("rows", "machines")}
"""The tables in the documentation, by what is behind their names: a processor that multiplies in bfloat16, or not."""


# Files


def write_json(path: Path, results: Results) -> None:
    """Write the results, all numbers of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def replace_section(text: str, section: str, content: str) -> str:
    """Put content between the comments `<!-- benchmarks:NAME -->` and `<!-- end of benchmarks:NAME -->`.

    Raises:
        ValueError: The text has not exactly one such pair.
    """
    begin, end = f"<!-- benchmarks:{section} -->", f"<!-- end of benchmarks:{section} -->"
    text, number = re.subn(f"(?s){begin}.*?{end}", lambda _: f"{begin}\n{content.strip()}\n{end}", text)
    if number != 1:
        raise ValueError(f"There has to be one {begin} in the text and one {end} after it.")
    return text


def update_docs(folder: Path, results: Results) -> None:
    """Put what was measured into the documentation; a row measured before stays, unless it was measured whole now.

    A processor that emulates bfloat16 has files and tables of its own.

    Args:
        folder: With `performance.md`, and `benchmarks.json` and `benchmarks-emulated.json` if they are there.
        results: What was measured now, on one machine.
    """
    # A row that failed before its process was ready knows nothing of the machine.
    machines = [result["environment"]["machine"] for result in results.values()]
    kind = EMULATED if any("bfloat16" in machine.get("emulated", ()) for machine in machines) else ""
    stored = folder / f"benchmarks{kind}.json"
    earlier: Results = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    whole = {name for name, result in results.items() if "error" not in result and not result.get("interrupted")}
    merged = earlier | {name: result for name, result in results.items() if name in whole or name not in earlier}
    merged = {name: merged[name] for name in ROWS if name in merged}
    page = folder / "performance.md"
    text = page.read_text(encoding="utf-8")
    for section, table in tables(merged).items():
        if section in PLACES[kind]:
            text = replace_section(text, f"{section}{kind}", table)
    write_json(stored, merged)
    page.write_text(text, encoding="utf-8")
    draw_chart(merged, folder / f"benchmarks{kind}.png")


# Chart


def draw_chart(results: Results, path: Path) -> bool:
    """Draw the time and memory beside the peers as bars; returns whether there was anything to draw."""
    comparisons = [one for result in results.values() for one in result.get("comparisons", ())]
    drawn = [one for one in comparisons if one["baseline"] in PEERS and one["ratio"] is not None]
    if not drawn:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 1 + 0.55 * len(drawn)), facecolor=SURFACE)
    for place, one in enumerate(reversed(drawn)):
        _draw_bar(axis, place, one)
    labels = [f"{one['what']}\nbeside {one['baseline']}" for one in reversed(drawn)]
    axis.set_yticks(range(len(drawn)), labels, fontsize=9, color=INK)
    title = "Time and memory of this package, in units of the peer's; lines from the lowest to the highest round"
    axis.set_title(title, loc="right", fontsize=10, color=MUTED)
    axis.set_facecolor(SURFACE)
    axis.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.tick_params(labelsize=8, labelcolor=INK, length=0)
    axis.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axis.set_xlim(0, 1.2 * max(1, *(one["ratio"] for one in drawn)))
    for side in axis.spines.values():
        side.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor=SURFACE, metadata={"Software": None})
    plt.close(figure)
    return True


def _draw_bar(axis: Any, place: int, one: dict[str, Any]) -> None:
    """One comparison: the ratio, a line from its lowest to its highest round, and both values in words."""
    axis.barh(place, one["ratio"], height=0.5, color=BAR, zorder=2)
    if one["spread"]:
        axis.plot(one["spread"], [place, place], color=INK, linewidth=1, zorder=3)
    end = max([one["ratio"], *(one["spread"] or ())])
    text = f"{one['ratio']:.2f}   ({_number(one['value'])} beside {_number(one['baseline_value'])} {one['unit']})"
    axis.annotate(text, (end, place), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=9)
