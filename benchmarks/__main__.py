"""Measure the encoder's speed and memory beside transformers' Unlimited-OCR and `deepseek-ocr-encoder`.

    python -m benchmarks                     # the default rows; about 20 minutes on two cores
    python -m benchmarks --quick             # the same on pages of 512 x 512, one pair; about 3 minutes
    python -m benchmarks --rows train,memory # these rows only
    python -m benchmarks --all --update-docs # everything, and into docs/ (about 55 minutes)

Rows:

    forward        forward pass in float32: time beside both peers, speed beside a plain matrix product
    forward-bf16   the same in bfloat16
    train          forward and backward of all parameters: time, and with gradient checkpointing
    memory         peak memory of that step, without and with checkpointing
    frozen         peak memory of a projector behind the frozen encoder, and of training CLIP alone
    batch          four pages at once beside one
    preprocessing  pages to pixel_values, beside torchvision and transformers' CLIP processor
    malloc         what it costs and saves that glibc keeps freed memory, or gives it back (not by default)
    allocators     the same with tcmalloc or jemalloc in glibc's place, if installed (not by default)
    compile        whether torch.compile helps (not by default; compiling takes minutes)
    profile        seconds by part, forward and backward (not by default)
    matrix         memory and time at 512, 640, 1024 and 1280 pixels by what is trained, with and without
                   checkpointing: measured where it fits, else computed (not by default; about 15 minutes)
    composite      memory and time of a step of a LLaVA, by what is frozen (not by default; about 4 minutes)

Every contestant runs in a process of its own, and only one computes at a time. Times are medians over pairs, taken in
turn after a warm-up; peaks of memory are those of fresh processes. All have random weights of the full size. What does
not fit into memory, or is not installed, is left out with the reason. An interruption (Ctrl-C) ends the run and keeps
what was measured. While it measures, nothing else should compute on the machine.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.rows import ROWS, Bench, Settings, tell
from benchmarks.workers import ROOT, JobError


INTERRUPTED = 130
BUSY = 0.5  # load average above which times are no longer this tool's own
OPTIONAL_ROWS = ("malloc", "allocators", "compile", "profile", "matrix", "composite")
QUICK = {"size": 512, "pairs": 1, "largest_measured": 512}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write tables, a JSON file and a chart.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.update_docs and (options.quick or options.tiny or options.size not in (None, report.MARKED_SIZE)):
        parser.error(f"--update-docs is for full-size measurements at {report.MARKED_SIZE}, the size of the marks")
    settings = _settings(options)
    load = report.load()
    if load is not None and load > BUSY:
        tell(f"Something else computes here (load {load:.1f}): ratios suffer a little, times and speeds a lot.")
    results: report.Results = {}
    status = 0
    try:
        _measure(_rows(options), settings, load, results)
    except KeyboardInterrupt:
        tell("Interrupted; what was measured is kept.")
        status = INTERRUPTED
    for table in report.tables(results).values():
        sys.stdout.write(f"{table}\n\n")
    written = [options.output]
    report.write_json(options.output, results)
    if report.draw_chart(results, options.output.with_suffix(".png")):
        written.append(options.output.with_suffix(".png"))
    if options.update_docs:
        report.update_docs(ROOT / "docs", results)
        written.append(ROOT / "docs")
    tell(f"Written: {', '.join(str(path) for path in written)}")
    return status


def _measure(names: list[str], settings: Settings, load: float | None, results: report.Results) -> None:
    """Measure row after row into `results`; one that is interrupted is kept as far as it came."""
    bench = Bench(settings)
    start = time.perf_counter()
    for place, name in enumerate(names, start=1):
        tell(f"[{place}/{len(names)}, {(time.perf_counter() - start) / 60:.1f} min] {name}: {ROWS[name].__doc__}")
        result: dict[str, Any] = {"settings": asdict(settings)}
        try:
            ROWS[name](bench, result)
        except JobError as error:
            tell(f"  not measured: {error}")
            result["error"] = str(error)
        except KeyboardInterrupt:
            result["interrupted"] = True
            raise
        finally:
            result["environment"] = report.environment(bench.about, load)
            result["lines"] = [asdict(line) for line in result.get("lines", ())]
            results[name] = result
    tell(f"[done, {(time.perf_counter() - start) / 60:.1f} min]")


def _rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows to measure, in the order of `ROWS`."""
    if options.rows is not None:
        chosen = set(options.rows)
    else:
        chosen = set(ROWS) if options.all else set(ROWS) - set(OPTIONAL_ROWS)
    chosen |= {name for name in OPTIONAL_ROWS if getattr(options, name)}
    return [name for name in ROWS if name in chosen]


def _settings(options: argparse.Namespace) -> Settings:
    chosen = QUICK if options.quick else {}
    stated = {"size": options.size, "pairs": options.pairs, "largest_measured": options.largest_measured}
    chosen = chosen | {name: value for name, value in stated.items() if value is not None}
    shared = {"threads": options.threads, "seed": options.seed, "device": options.device, "tiny": options.tiny}
    return Settings(**chosen, **shared)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=_row_names, metavar="ROW,ROW", help="measure these rows and no others")
    add("--quick", action="store_true", help="pages of 512 x 512 and one pair; the marks are for 1024")
    add("--profile", action="store_true", help="also the row profile")
    add("--malloc", action="store_true", help="also the row malloc")
    add("--allocators", action="store_true", help="also the row allocators")
    add("--compile", action="store_true", help="also the row compile")
    add("--matrix", action="store_true", help="also the row matrix")
    add("--composite", action="store_true", help="also the row composite")
    add("--all", action="store_true", help="all rows")
    add("--size", type=_page_size, help="side of the page in pixels, a multiple of 64 (default: 1024)")
    add("--pairs", type=_positive, help="rounds in which contestants take turns, after a warm-up (default: 3)")
    add("--largest-measured", type=_page_size, help="larger pages of the matrix are computed (default: 1280)")
    add("--threads", type=_positive, help="PyTorch's threads (default: as many as PyTorch takes)")
    add("--seed", type=int, default=0, help="of weights and pixels (default: 0)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="what computes (default: cpu)")
    add("--output", type=Path, default=Path("outputs/benchmarks.json"), help="the chart goes beside it, as .png")
    add(
        "--update-docs",
        action="store_true",
        help="also write docs/benchmarks.json, docs/benchmarks.png and the tables in docs/performance.md; rows not "
        "measured now stay as they are there",
    )
    add("--tiny", action="store_true", help="an encoder of 2 + 2 layers and width 32, to test the tool itself")
    return parser


def _row_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no row; there are {', '.join(ROWS)}")
    return names


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _page_size(text: str) -> int:
    number = _positive(text)
    if number % 64:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 64")
    return number


if __name__ == "__main__":
    sys.exit(main())
