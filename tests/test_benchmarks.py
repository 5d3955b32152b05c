"""The benchmarks: the arithmetic that they state, what they write, and a whole run of the tool on a tiny encoder."""

import json
import sys
import weakref

import pytest
import torch
from helpers import FEATURE_MODES, ROOT, pixels, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel


pytest.importorskip("peft", reason="the extra `dev` is not installed")
pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command_line
from benchmarks import report, rows, workers
from benchmarks.memory import step_memory
from benchmarks.operations import PARTS, forward_operations, step_operations
from benchmarks.workers import Job, JobError, Worker
from benchmarks.workloads import Workload, prepare_training, unlimited_ocr


# The formula leaves out what is no part of a block: position tables, index tensors, the row for the windows' padding.
MEMORY_TOLERANCE = 0.05


class Kept:
    """A tensor that is kept for the backward pass."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def kept_bytes(model: DeepSeekOCRVisionModel, pixel_values: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass beyond the weights, each storage counted once."""
    alive = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        tokens = model(pixel_values).last_hidden_state
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert tokens.shape[0] == pixel_values.shape[0]
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def comparison(**fields) -> dict:
    values = {"what": "forward, float32: time", "ours": 6.0, "theirs": 10.0, "value": 0.6, "spread": (0.59, 0.62)}
    return vars(rows.Line(**(values | {"at_most": 0.64} | fields)))


def results_of(*lines: dict, **settings) -> report.Results:
    settings = vars(rows.Settings(**settings))
    around = report.environment({"threads": 2, "device": "AVX512"}, 0.0)
    return {"forward": {"settings": settings, "environment": around, "lines": list(lines)}}


def test_the_released_encoder_takes_1139_gflop_a_page():
    """Pins the count that speeds are reported by, and the padding of windows in it."""
    config = DeepSeekOCRVisionConfig(feature_mode="concat")
    parts = forward_operations(config, 1024)
    assert tuple(parts) == PARTS
    assert sum(part.total for part in parts.values()) == pytest.approx(1139e9, rel=1e-3)
    assert parts["CLIP"].total == pytest.approx(162e9, rel=5e-3)
    sam_attention = parts["windowed blocks"].attention + parts["global blocks"].attention
    assert sam_attention == pytest.approx(235e9, rel=5e-3)
    without_padding = forward_operations(config, 1024, padding=False)
    assert without_padding["global blocks"] == parts["global blocks"]
    assert sum(part.total for part in without_padding.values()) == pytest.approx(1104e9, rel=1e-3)


@pytest.mark.parametrize("size", [128, 320])
def test_operations_are_those_that_pytorch_counts_in_unlimited_ocr(size):
    """Pins every term, padded windows included, to a counter that knows nothing of the formula."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="this transformers has no Unlimited-OCR")
    # Products are counted by every version of the counter, the fused attention of a CPU only by some.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unlimited_ocr(Job(tiny=True))(pixels(1, size, size))
    config = tiny_config(feature_mode="concat")
    assert counter.get_total_flops() == sum(part.total for part in forward_operations(config, size).values())


def test_a_step_counts_what_the_backward_pass_goes_through():
    """Pins the counts that times are computed by where they were not measured."""
    config = tiny_config()
    forward = step_operations(config, 128)
    assert step_operations(config, 128, training="frozen", checkpointing=True) == forward
    assert step_operations(config, 128, training="full") == 3 * forward
    clip = forward_operations(config, 128)["CLIP"].total
    assert step_operations(config, 128, training="clip") == forward + 2 * clip
    assert step_operations(config, 128, training="clip", checkpointing=True) == forward + 3 * clip
    assert 2 * forward < step_operations(config, 128, training="lora") < 3 * forward


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", ["frozen", "clip", "lora", "full"])
def test_the_memory_formula_gives_the_bytes_that_are_kept_for_the_backward_pass(training, checkpointing):
    """Pins the formula to the attention as it is: one that keeps its logits would be far from it."""
    config = tiny_config(feature_mode="concat")
    model = DeepSeekOCRVisionModel(config).train()
    prepare_training(model, training)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    computed = step_memory(config, 256, training=training, checkpointing=checkpointing, batch_size=2)
    kept = kept_bytes(model, pixels(2, 256, 256))
    assert kept == pytest.approx(computed.kept, rel=MEMORY_TOLERANCE)
    assert computed.gradients == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert computed.parameters == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_the_peak_is_more_than_what_is_kept_and_checkpointing_lowers_it(feature_mode):
    """Pins the order of the terms, in every feature mode."""
    config = tiny_config(feature_mode=feature_mode)
    plain, checkpointed = (step_memory(config, 512, training="full", checkpointing=flag) for flag in (False, True))
    assert plain.peak > plain.parameters + plain.kept
    assert checkpointed.peak < plain.peak
    assert checkpointed.gradients == plain.gradients
    half = step_memory(config, 512, training="full", value_size=2)
    assert plain.peak / 2 < half.peak < plain.peak


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
    for section in report.SECTIONS:
        assert "| table |" in report.replace_section(text, section, "| table |")


def test_rows_of_earlier_runs_stay_in_the_documentation(tmp_path):
    """Pins a later run of some rows, after which the others have to be there still."""
    sections = [f"<!-- benchmarks:{name} -->\n<!-- end of benchmarks:{name} -->\n" for name in report.SECTIONS]
    (tmp_path / "performance.md").write_text("".join(sections))
    report.update_docs(tmp_path, results_of(comparison()))
    rates = {"settings": vars(rows.Settings()), "environment": report.environment({}, None), "lines": []}
    report.update_docs(tmp_path, {"preprocessing": rates | {"pictures_per_second": {"a way": 12.0}}})
    page = (tmp_path / "performance.md").read_text()
    assert "| forward, float32: time | 6.00 s | Unlimited-OCR | 10.00 s | **0.60** (0.59 to 0.62) |" in page
    assert "| a way | 12.0 |" in page
    assert json.loads((tmp_path / "benchmarks.json").read_text()).keys() == {"forward", "preprocessing"}
    assert (tmp_path / "benchmarks.png").stat().st_size > 1000


def test_a_mark_is_met_or_not_only_at_the_size_that_it_is_stated_for():
    """Pins a quick run on small pages that claims to have met what it did not measure."""
    assert report.tables(results_of(comparison()))["rows"].count("| yes |") == 1
    assert report.tables(results_of(comparison(value=0.65)))["rows"].count("| no |") == 1
    small = report.tables(results_of(comparison(), size=512))["rows"]
    assert "| yes |" not in small
    assert "| no |" not in small


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    """Pins twenty minutes of measurements that go with a Ctrl-C, and a row that cannot be measured."""

    def interrupted(bench, result):
        result["lines"] = [rows.Line(**comparison(what="half a row"))]
        raise KeyboardInterrupt

    def too_large(bench, result):
        raise JobError("needs about 19 GB, of which 8 are available")

    def measured(bench, result):
        result["lines"] = [rows.Line(**comparison())]

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
    job = Job(contestant="deepseek-ocr-encoder", tiny=True)
    with Worker(job) as worker, pytest.raises(JobError, match="1024 channels wide"):
        worker.ready()


def test_the_tool_measures_a_tiny_encoder_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Pins the whole way: processes, turns, table, JSON and chart."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "benchmarks.json"
    options = ["--tiny", "--size", "128", "--pairs", "2", "--rows", "forward", "--output", str(output)]
    assert command_line.main(options) == 0
    result = json.loads(output.read_text())["forward"]
    to_peer, to_package, speed = result["lines"]
    assert len(result["rounds"]) == 2
    assert to_peer["spread"][0] <= to_peer["value"] <= to_peer["spread"][1]
    assert "1024 channels wide" in to_package["skipped"]
    assert speed["value_unit"] == "%"
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
    workload = Workload(Job(contestant="composite", training=training, size=128, tiny=True))
    loss = workload._loss(workload.pixel_values)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in workload.model.named_parameters():
        expected = any(f".{part}." in f".{name}" for part in parts)
        assert (parameter.grad is not None) == expected, name
    peak = {"size": 128, "training": training, "peak": 3e9, "seconds": 2.0, "imported": 1}
    results = results_of()
    results["composite"] = results.pop("forward") | {"cells": [peak | {"trained": workload.about()["trained"]}]}
    assert f"| 128 | {report.FROZEN[training]} |" in report.tables(results)["composite"]


def test_an_allocator_that_is_not_installed_is_left_out_with_the_reason(monkeypatch):
    """Pins a process that goes on with glibc's allocator, since the loader only warns, under another one's name."""
    monkeypatch.setattr(rows, "find_library", lambda name: None)
    result = {}
    rows.allocators(rows.Bench(rows.Settings(size=64, pairs=1, threads=1, tiny=True)), result)
    assert [line.skipped for line in result["lines"]] == [f"lib{name} is not installed" for name in rows.ALLOCATORS]


def test_a_job_names_the_allocator_of_its_process(monkeypatch):
    """Pins the variable that the loader reads."""
    started = {}
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *args, **options: started.update(options))
    workers.Worker(Job(tiny=True, allocator="libtcmalloc_minimal.so.4"))
    assert started["env"]["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
