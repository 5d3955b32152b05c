"""The benchmarks: the operations that they count, what they write, and a whole run with a tiny encoder."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, pixels, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepseek_ocr_vision import DeepSeekOCRVisionConfig


pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command_line
from benchmarks import report, rows
from benchmarks.environment import environment
from benchmarks.models import unlimited_ocr
from benchmarks.operations import forward_operations
from benchmarks.processes import Job, JobError, Worker
from benchmarks.workloads import Workload


PLACES = "".join(
    f"<!-- benchmarks:{section}{kind} -->\n<!-- end of benchmarks:{section}{kind} -->\n"
    for kind, sections in report.PLACES.items()
    for section in sections
)


def comparison(**fields) -> dict:
    values = {"what": "forward, float32: time", "baseline": "Unlimited-OCR", "value": 6.0, "baseline_value": 10.0}
    return vars(rows.Comparison(**(values | {"ratio": 0.6, "spread": (0.59, 0.62)} | fields)))


def results_of(name: str, *, emulated: tuple[str, ...] = (), **measured) -> report.Results:
    around = environment({"threads": 2, "device": "AVX512", "emulated": list(emulated)}, 0.0)
    return {name: {"settings": vars(rows.Settings()), "environment": around} | measured}


def test_the_released_encoder_takes_1139_gflop_a_page():
    """Pins the count that speeds are reported by."""
    parts = forward_operations(DeepSeekOCRVisionConfig(feature_mode="concat"), 1024)
    assert sum(parts.values()) == pytest.approx(1139e9, rel=1e-3)
    assert parts["CLIP"] == pytest.approx(162e9, rel=5e-3)


@pytest.mark.parametrize("size", [128, 320])
def test_operations_are_those_that_pytorch_counts_in_unlimited_ocr(size):
    """Pins every term, padded windows included, to a counter that knows nothing of the formula."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="this transformers has no Unlimited-OCR")
    # Products are counted by every version of the counter, the fused attention of a CPU only by some.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unlimited_ocr(Job(tiny=True))(pixels(1, size, size))
    config = tiny_config(feature_mode="concat")
    assert counter.get_total_flops() == sum(forward_operations(config, size).values())


def test_a_section_of_a_page_is_replaced_between_its_markers_and_nothing_else():
    """Pins documentation that grows at every run, or loses what stands beside the tables."""
    text = "before\n<!-- benchmarks:rows -->\nnot measured yet\n<!-- end of benchmarks:rows -->\nafter\n"
    once = report.replace_section(text, "rows", "| table |\n")
    assert once == "before\n<!-- benchmarks:rows -->\n| table |\n<!-- end of benchmarks:rows -->\nafter\n"
    assert report.replace_section(once, "rows", "| table |") == once
    with pytest.raises(ValueError, match="benchmarks:matrix"):
        report.replace_section(text, "matrix", "")


def test_the_page_about_performance_has_a_place_for_every_table():
    """Pins the markers in `docs/performance.md` to the sections that the tool writes."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for kind, sections in report.PLACES.items():
        for section in sections:
            assert "| table |" in report.replace_section(text, f"{section}{kind}", "| table |")


def test_rows_of_earlier_runs_stay_in_the_documentation(tmp_path):
    """Pins a later run of some rows, after which the others have to be there still."""
    (tmp_path / "performance.md").write_text(PLACES)
    report.update_docs(tmp_path, results_of("forward", comparisons=[comparison()]))
    report.update_docs(tmp_path, results_of("preprocessing", images_per_second={"a way": 12.0}))
    page = (tmp_path / "performance.md").read_text()
    assert "| forward, float32: time | 6.00 s | Unlimited-OCR | 10.00 s | **0.60** (0.59 to 0.62) |" in page
    assert "| a way | 12.0 |" in page
    assert json.loads((tmp_path / "benchmarks.json").read_text()).keys() == {"forward", "preprocessing"}
    assert (tmp_path / "benchmarks.png").stat().st_size > 1000


def test_a_processor_that_emulates_bfloat16_has_a_table_of_its_own(tmp_path):
    """Pins times in one table of machines on which half precision is fast and slow."""
    (tmp_path / "performance.md").write_text(PLACES)
    report.update_docs(tmp_path, results_of("forward", comparisons=[comparison()]))
    slow = comparison(value=100.0, baseline_value=50.0, ratio=2.0, spread=None)
    failed = results_of("train", error="needs more memory")
    del failed["train"]["environment"]["machine"]["emulated"]  # before its process was ready
    measured = results_of("forward", emulated=("bfloat16", "float16"), comparisons=[slow])
    report.update_docs(tmp_path, failed | measured)
    table, other = (tmp_path / "performance.md").read_text().split("<!-- benchmarks:rows-emulated -->")
    assert "**0.60**" in table
    assert "**2.00**" not in table
    assert "| forward, float32: time | 100 s | Unlimited-OCR | 50.0 s | **2.00** |" in other
    assert "(AVX512, which emulates bfloat16 and float16)" in other
    assert (tmp_path / "benchmarks-emulated.json").is_file()


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    """Pins twenty minutes of measurements that go with a Ctrl-C, and a row that cannot be measured."""

    def interrupted(bench, result):
        result["comparisons"] = [rows.Comparison(**comparison(what="half a row"))]
        raise KeyboardInterrupt

    def too_large(bench, result):
        raise JobError("needs about 19 GB, of which 8 are available")

    def measured(bench, result):
        result["comparisons"] = [rows.Comparison(**comparison())]

    changed = {"forward": measured, "train": too_large, "memory": interrupted, "batch": measured}
    monkeypatch.setattr(command_line, "ROWS", rows.ROWS | changed)
    output = tmp_path / "benchmarks.json"
    chosen = ["--rows", "forward,train,memory,batch"]
    assert command_line.main([*chosen, "--tiny", "--output", str(output)]) == command_line.INTERRUPTED
    assert json.loads(output.read_text()).keys() == {"forward", "train", "memory"}
    table = capsys.readouterr().out
    assert "half a row" in table
    assert "not measured: needs about 19 GB" in table


def test_small_measurements_do_not_get_into_the_documentation(capsys):
    """Pins tables for everybody against the numbers of a quick run."""
    with pytest.raises(SystemExit):
        command_line.main(["--quick", "--update-docs"])
    assert "full-size" in capsys.readouterr().err


def test_a_process_that_cannot_do_its_job_says_why():
    """Pins the reason in the table instead of a crash of the run."""
    with Worker(Job(subject="deepseek-ocr-encoder", tiny=True)) as worker:
        with pytest.raises(JobError, match="fixed width of 1024"):
            worker.ready()
        adjustment = Path(f"/proc/{worker._process.pid}/oom_score_adj")
        # Memory that runs out should cost this process and none of the user's own.
        assert not adjustment.is_file() or adjustment.read_text().strip() == "1000"


def test_a_process_that_is_killed_says_so():
    """Pins a run that goes on after a step that did not fit into memory."""
    with Worker(Job(tiny=True)) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(JobError, match="memory ran out"):
            worker.ask("step")


def test_a_job_that_was_not_measured_keeps_its_place_in_the_table():
    """Pins a table by size that shifts, or stops, where one of its jobs did not fit into memory."""
    measured = {"training": "full", "checkpointing": False, "seconds": 2.0, "peak": 3e9, "imported": 1}
    cells = [measured | {"size": 512}, {"size": 1024, "training": "full", "checkpointing": False, "skipped": "killed"}]
    table = report.tables(results_of("matrix", cells=cells))["matrix"]
    assert "| trained | 512 x 512 | 1024 x 1024 |" in table
    assert "| everything | 3.00 GB, 2.0 s | not measured: killed |" in table


def test_the_tool_measures_a_tiny_encoder_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Pins the whole way: processes, turns, table, JSON and chart."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="this transformers has no Unlimited-OCR")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "benchmarks.json"
    options = ["--tiny", "--size", "128", "--pairs", "2", "--rows", "forward", "--output", str(output)]
    assert command_line.main(options) == 0
    result = json.loads(output.read_text())["forward"]
    to_peer, to_package, speed = result["comparisons"]
    assert len(result["rounds"]) == 2
    assert to_peer["spread"][0] <= to_peer["ratio"] <= to_peer["spread"][1]
    assert "fixed width of 1024" in to_package["skipped"]
    assert speed["spread"][0] <= speed["ratio"] <= speed["spread"][1]
    assert result["environment"]["machine"]["threads"] == 1
    assert {"torch", "transformers", "python"} <= result["environment"]["versions"].keys()
    assert "| forward, float32: time |" in capsys.readouterr().out
    assert output.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("training", "parts"),
    [
        ("projector", ("multi_modal_projector",)),
        ("frozen", ("multi_modal_projector", "language_model", "lm_head")),
        ("clip", ("vision_tower.vision_model", "multi_modal_projector", "language_model", "lm_head")),
        ("full", ("vision_tower", "multi_modal_projector", "language_model", "lm_head")),
    ],
)
def test_a_step_of_the_composite_trains_what_its_row_says(training, parts):
    """Pins the table of composites: what is frozen there, and that a step reaches everything else."""
    workload = Workload(Job(subject="composite", training=training, size=128, tiny=True))
    trained = workload.build()["trained"]
    loss = workload.loss(workload.pixel_values)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in workload.model.named_parameters():
        expected = any(f".{part}." in f".{name}" for part in parts)
        assert (parameter.grad is not None) == expected, name
    cell = {"size": 128, "training": training, "checkpointing": False, "peak": 3e9, "seconds": 2.0, "imported": 1}
    table = report.tables(results_of("composite", cells=[cell | {"trained": trained}]))["composite"]
    assert f"| {report.FROZEN[training]} ({trained / 1e6:.1f} M trained) |" in table
