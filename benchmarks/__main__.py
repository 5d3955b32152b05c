"""Measure the encoder's speed and memory beside transformers' Unlimited-OCR and `deepseek-ocr-encoder`.

    python -m benchmarks                     # the default rows; about 20 minutes on two cores
    python -m benchmarks --quick             # the same on pages of 512 x 512, one pair; about 3 minutes
    python -m benchmarks --rows train,memory # these rows only
    python -m benchmarks --all --update-docs # everything, and into docs/ (about 45 minutes)

Everything that is compared runs in a process of its own, and only one computes at a time. Times are medians over
pairs, taken in turn after a warm-up; peaks of memory are those of new processes. All weights are random and of the
full size. What does not fit into memory, or is not installed, is left out with the reason. An interruption (Ctrl-C)
ends the run and keeps what was measured. While it measures, nothing else should compute on the machine.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import report
from benchmarks.environment import environment, load
from benchmarks.processes import ROOT, JobError
from benchmarks.rows import ROWS, Bench, Result, Settings, progress


INTERRUPTED = 130
BUSY = 0.5  # a load average above this makes times too long
OPTIONAL_ROWS = ("compile", "profile", "matrix", "composite")
DOCUMENTED_SIZE = 1024
QUICK = {"size": 512, "pairs": 1, "largest_measured": 512}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write tables, a JSON file and a chart; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.update_docs and (options.quick or options.tiny or options.size not in (None, DOCUMENTED_SIZE)):
        parser.error(f"--update-docs is for full-size measurements at {DOCUMENTED_SIZE}")
    results: report.Results = {}
    status = 0
    try:
        _measure(_rows(options), _settings(options), results)
    except KeyboardInterrupt:
        progress("Interrupted; what was measured is kept.")
        status = INTERRUPTED
    for table in report.tables(results).values():
        sys.stdout.write(f"{table}\n\n")
    _write(options, results)
    return status


def _measure(names: list[str], settings: Settings, results: report.Results) -> None:
    """Measure row after row into `results`; a row that is interrupted keeps what it has measured."""
    bench, load_at_start, start = Bench(settings), load(), time.perf_counter()
    if load_at_start is not None and load_at_start > BUSY:
        progress(f"Something else computes here (load {load_at_start:.1f}): times are too long, ratios less so.")
    for place, name in enumerate(names, start=1):
        minutes = (time.perf_counter() - start) / 60
        progress(f"[{place}/{len(names)}, {minutes:.1f} min] {name}: {ROWS[name].__doc__}")
        result: Result = {"settings": asdict(settings)}
        try:
            ROWS[name](bench, result)
        except JobError as error:
            progress(f"  not measured: {error}")
            result["error"] = str(error)
        except KeyboardInterrupt:
            result["interrupted"] = True
            raise
        finally:
            result["environment"] = environment(bench.machine, load_at_start)
            if "comparisons" in result:
                result["comparisons"] = [asdict(one) for one in result["comparisons"]]
            results[name] = result


def _write(options: argparse.Namespace, results: report.Results) -> None:
    written, chart = [options.output], options.output.with_suffix(".png")
    report.write_json(options.output, results)
    if report.draw_chart(results, chart):
        written.append(chart)
    if options.update_docs:
        report.update_docs(ROOT / "docs", results)
        written.append(ROOT / "docs")
    progress(f"Written: {', '.join(str(path) for path in written)}")


def _rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows to measure, in the order of `ROWS`."""
    chosen = set(ROWS) if options.all else set(options.rows or set(ROWS) - set(OPTIONAL_ROWS))
    chosen |= {name for name in OPTIONAL_ROWS if getattr(options, name)}
    return [name for name in ROWS if name in chosen]


def _settings(options: argparse.Namespace) -> Settings:
    names = ("size", "pairs", "largest_measured", "threads", "seed", "device", "tiny")
    stated = {name: value for name in names if (value := getattr(options, name)) is not None}
    return Settings(**((QUICK if options.quick else {}) | stated))


def _parser() -> argparse.ArgumentParser:
    rows = [f"    {name:14} {row.__doc__}" for name, row in ROWS.items()]
    epilog = "\n".join(["rows:", *rows, "", f"Not measured by default: {', '.join(OPTIONAL_ROWS)}."])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=epilog, formatter_class=raw
    )
    add = parser.add_argument
    add("--rows", type=_row_names, metavar="ROW,ROW", help="measure these rows and no others")
    for name in OPTIONAL_ROWS:
        add(f"--{name}", action="store_true", help=f"also the row {name}")
    add("--all", action="store_true", help="all rows")
    add("--quick", action="store_true", help="pages of 512 x 512 and one pair")
    add("--size", type=_page_size, help="side of the page in pixels, a multiple of 64 (default: 1024)")
    add("--pairs", type=_positive, help="rounds of a comparison, after a warm-up (default: 3)")
    add("--largest-measured", type=_page_size, help="leave larger pages out of tables by size (default: 1280)")
    add("--threads", type=_positive, help="PyTorch's threads (default: PyTorch's own number)")
    add("--seed", type=int, default=0, help="of weights and pixels (default: 0)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="what computes (default: cpu)")
    add("--output", type=Path, default=Path("outputs/benchmarks.json"), help="the chart goes beside it, as .png")
    update = "also write docs/benchmarks.json, its chart, and the tables in docs/performance.md; other rows stay there"
    update += "; what a processor that emulates bfloat16 measures has its own"
    add("--update-docs", action="store_true", help=update)
    add("--tiny", action="store_true", help="an encoder of tiny size, to test the benchmarks themselves")
    return parser


def _row_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]!r}; the rows are {', '.join(ROWS)}")
    return names


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _page_size(text: str) -> int:
    number = _positive(text)
    if number % 64:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 64")
    return number


if __name__ == "__main__":
    sys.exit(main())
