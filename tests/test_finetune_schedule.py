"""How long `examples/finetune.py` trains and at which rates: what suits the pages and the parts."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from deepseek_ocr_vision.composites import build_model, build_processor


pytest.importorskip("datasets", reason="the extra `train` is not installed")
pytest.importorskip("rapidfuzz", reason="the extra `train` is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning import processes, schedule
from finetuning.arguments import FinetuneArguments, ModelArguments, parse_arguments


def fitted(*options: str, num_pages: int = 108, page_size: int = 128, is_own: bool = True) -> FinetuneArguments:
    """Arguments as they are after a look at the pages."""
    arguments = parse_arguments(["--output_dir", "nowhere", "--use_cpu", "true", *options])[2]
    schedule.fit_to_data(arguments, num_pages=num_pages, page_size=page_size, is_own=is_own)
    return arguments


def test_warm_up_logs_and_checkpoints_are_shares_of_the_run():
    """Pins 200 steps of warm-up in a run of 12, which never reached its rate and logged nothing."""
    arguments = fitted("--num_train_epochs", "3")
    assert arguments.max_steps == -1
    assert schedule.steps_per_epoch(arguments, 108) == 4
    assert (arguments.warmup_steps, arguments.logging_steps) == (3, 1)
    assert (arguments.eval_steps, arguments.save_steps) == (3, 3)


@pytest.mark.parametrize(
    ("options", "num_pages", "steps"),
    [((), 108, 1000), ((), 64_000, 6000), (("--max_steps", "7"), 108, 7), (("--num_train_epochs", "3"), 108, -1)],
)
def test_own_pages_are_trained_on_for_enough_steps_unless_another_number_is_asked_for(options, num_pages, steps):
    """Pins `--max_steps`, whose default stood above `--num_train_epochs`, and runs too short to learn anything."""
    assert fitted(*options, num_pages=num_pages).max_steps == steps


def test_handwritten_digits_take_as_long_as_they_did():
    """Pins `make finetune`, a job of minutes."""
    arguments = fitted(num_pages=32_000, is_own=False)
    assert (arguments.max_steps, arguments.warmup_steps, arguments.logging_steps) == (1100, 220, 22)
    assert (arguments.eval_steps, arguments.save_steps) == (220, 220)
    assert (arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size) == (32, 96)


def test_a_checkpoint_falls_on_a_log_and_an_evaluation():
    """Pins a mean of losses that a resumed run takes over fewer steps, and a best model that has no checkpoint."""
    for steps in (51, 99, 333, 1001):
        arguments = fitted("--max_steps", str(steps))
        assert arguments.save_steps % arguments.logging_steps == 0
        assert arguments.save_steps % arguments.eval_steps == 0


def test_large_pages_come_in_smaller_batches():
    """Pins 32 pages of 1024 x 1024 pixels at once, for which no GPU has the memory."""
    assert [fitted(page_size=size).per_device_train_batch_size for size in (256, 512, 1024)] == [32, 8, 2]


def test_a_run_of_few_steps_is_warned_of(caplog):
    """Pins a run of 12 steps that ends without a word."""
    with caplog.at_level(logging.WARNING, "finetune"):
        fitted("--num_train_epochs", "3")
        assert "12 steps are few" in caplog.text
        caplog.clear()
        fitted()
        assert "few" not in caplog.text


# Rates


@pytest.fixture
def model():
    return build_model(build_processor(page_size=128))


def groups_by_name(model, **given) -> dict[str, set[float]]:
    arguments = FinetuneArguments(output_dir="nowhere", use_cpu=True)
    groups = schedule.parameter_groups(model, model_arguments=ModelArguments(**given), arguments=arguments)
    found: dict[str, set[float]] = {}
    for group in groups:
        found.setdefault(group["name"].removeprefix("model.vision_tower."), set()).add(round(group["lr"], 12))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert groups[0]["name"] == "new"  # whose rate Trainer logs
    return found


def test_a_new_model_has_one_rate(model):
    """Pins other losses than before for what has nothing to lose."""
    arguments = FinetuneArguments(output_dir="nowhere", use_cpu=True)
    assert schedule.parameter_groups(model, model_arguments=ModelArguments(), arguments=arguments) is None


def test_pretrained_parts_get_lower_rates_by_default(model):
    """Pins a rate made for a new projector, which undoes what a pretrained encoder knows."""
    found = groups_by_name(model, encoder="an encoder", language_model="a language model")
    assert found.pop("new") == {1e-3}
    assert found.pop("language") == {2e-5}
    depths = list(found)
    assert found[depths[-1]] == {5e-5}
    assert found[depths[-2]] == {round(5e-5 * 0.9, 12)}
    first = min(rate for rates in found.values() for rate in rates)
    assert found[depths[0]] == {first}


def test_only_the_pretrained_part_is_spared(model):
    """Pins a new language model that hardly learns because the encoder is pretrained."""
    found = groups_by_name(model, encoder="an encoder", encoder_learning_rate=1e-4, layer_decay=1.0)
    assert found.pop("new") == found.pop("language") == {1e-3}
    assert {rate for rates in found.values() for rate in rates} == {1e-4}


def test_frozen_groups_are_in_no_group(model):
    """Pins an optimizer with states for what is not trained."""
    model.model.vision_tower.freeze()
    assert set(groups_by_name(model, encoder="an encoder")) == {"new", "language"}


# Processes


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    """Pins two identical runs into one folder, under a launcher on a machine without a GPU."""
    arguments = FinetuneArguments(output_dir="nowhere", use_cpu=True)
    processes.require_processes_that_meet(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started.*--use_cpu true"):
        processes.require_processes_that_meet(arguments)
    assert not torch.distributed.is_initialized()
