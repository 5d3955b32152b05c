"""Several processes: the losses and gradients of one process with the same batches, under DDP and FSDP2."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import training_job
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import merge_fsdp_weights, prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers import FEATURE_MODES, TOLERANCE, free_port, pixels, relative_error, tiny_config
from training_job import Job, needs_fsdp_on_cpu, result_of, tensors_of
from transformers import LlavaForConditionalGeneration

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites import build_model, build_processor
from deepseek_ocr_vision.training.resuming import load_weights


CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"
STEPS = 3
SUBJECTS = ("classifier", "llava", "reentrant checkpointing", "checkpointing", "bfloat16")
FSDP_SUBJECTS = ("classifier", "llava", "checkpointing", "bfloat16")


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, str]:
    """A classifier's encoder and a LLaVA as one process saves them; everything here starts from these."""
    folder = tmp_path_factory.mktemp("starts")
    DeepSeekOCRVisionModel(tiny_config()).save_pretrained(folder / "classifier")
    build_model(build_processor(page_size=128)).save_pretrained(folder / "llava")
    return {"classifier": str(folder / "classifier"), "llava": str(folder / "llava")}


def jobs(folder: Path, starts: dict[str, str], *, num_processes: int) -> dict[str, Job]:
    """A job for each subject, with two samples a step however many processes there are."""
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 2 // num_processes}
    # Every parameter has to get a gradient in every process: DDP must not be told to bear with less.
    arguments["ddp_find_unused_parameters"] = False
    made = {}
    for name in SUBJECTS:
        model = "classifier" if name == "classifier" else "llava"
        made[name] = Job(str(folder / name), model, arguments | {"bf16": name == "bfloat16"}, start_from=starts[model])
        # Under this name half of the samples have no image, and so half of the batches of one sample.
        made[name].images = name != "llava"
    for name in ("checkpointing", "reentrant checkpointing"):
        kwargs = {"use_reentrant": name == "reentrant checkpointing"}
        made[name].arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory, starts) -> dict[str, Job]:
    """Each subject in one process."""
    todo = jobs(tmp_path_factory.mktemp("alone"), starts, num_processes=1)
    assert training_job.start(*todo.values()) == [0]
    return todo


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, starts) -> dict[str, Job]:
    """Each subject in two processes that talk by gloo, started by `accelerate launch`."""
    todo = jobs(tmp_path_factory.mktemp("ddp"), starts, num_processes=2)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", free_port()]
    command += [
        "--config_file",
        str(CONFIGS / "two_cpus.yaml"),
        training_job.__file__,
        training_job.as_json(*todo.values()),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=training_job.TIME_LIMIT, check=False)
    assert process.returncode == 0, process.stderr
    return todo


def launcher_arguments(config: str, *options: str) -> Namespace:
    """What `accelerate launch` makes of one of the examples' configurations."""
    arguments = ["--config_file", str(CONFIGS / config), "--main_process_port", free_port(), *options, "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory, starts) -> dict[str, Job]:
    """Each subject in two processes that share the weights; two of them save, in FSDP's two ways."""
    todo = jobs(tmp_path_factory.mktemp("fsdp"), starts, num_processes=2)
    del todo["reentrant checkpointing"]
    environment = prepare_multi_gpu_env(launcher_arguments("fsdp2.yaml", "--mixed_precision", "no"))
    for job in todo.values():
        job.fsdp = True
        job.environment = {name: environment[name] for name in environment if name.startswith(("FSDP", "ACCELERATE"))}
    for name in ("llava", "checkpointing"):
        todo[name].arguments |= {"save_strategy": "steps", "save_steps": STEPS, "gradient_checkpointing": False}
    sharded = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    todo["checkpointing"].environment |= sharded
    # transformers 5.0 does not collect these for a LLaVA.
    todo["bfloat16"].environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "SamBlock,ClipLayer,LlamaDecoderLayer"
    assert training_job.start(*todo.values(), num_processes=2) == [0, 0]
    return todo


def assert_same_training(actual: Job, expected: Job, tolerance: float) -> None:
    """Losses of all steps, and all gradients of the first, agree."""
    losses, expected_losses = ([entry["loss"] for entry in result_of(job)["log"]] for job in (actual, expected))
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    gradients, expected_gradients = (tensors_of(job, "gradients") for job in (actual, expected))
    assert gradient_errors(gradients, expected_gradients, tolerance) == {}


def gradient_errors(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> dict[str, float]:
    """How far gradients are off, relative to their norm, where that is too far."""
    assert actual.keys() == expected.keys()
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    errors = {name: ((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected}
    return {name: error for name, error in errors.items() if not error < tolerance}


def tolerance_of(name: str) -> float:
    return TOLERANCE[torch.bfloat16 if name == "bfloat16" else torch.float32]


@pytest.mark.parametrize("name", SUBJECTS)
def test_two_processes_train_as_one_does(name, alone, ddp):
    """Pins a mean over processes instead of tokens, parameters without gradient, and checkpointing that DDP breaks."""
    assert_same_training(ddp[name], alone[name], tolerance_of(name))


def test_each_process_had_batches_with_and_without_images(ddp):
    """Pins the test above passing because the batches that it is about never came up."""
    first, second = result_of(ddp["llava"])["had_image"]
    assert {(True, False), (False, True)} & set(zip(first, second, strict=True))
    assert (False, False) in set(zip(first, second, strict=True))


@needs_fsdp_on_cpu
@pytest.mark.parametrize("name", FSDP_SUBJECTS)
def test_processes_that_share_the_weights_train_as_one_does(name, alone, fsdp):
    """Pins weights that are used before they are gathered, and checkpoints that only rank 0 has read."""
    assert_same_training(fsdp[name], alone[name], tolerance_of(name))


@needs_fsdp_on_cpu
def test_each_block_is_a_unit_of_its_own(fsdp):
    """Pins `_no_split_modules` that name no class, with which all weights would be gathered at once."""
    assert {"SamBlock", "ClipLayer", "LlamaDecoderLayer"} <= set(result_of(fsdp["bfloat16"])["units"])
    assert {"SamBlock", "ClipLayer"} <= set(result_of(fsdp["classifier"])["units"])


def assert_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    weights = dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


@needs_fsdp_on_cpu
@pytest.mark.parametrize("name", ["llava", "checkpointing"])
def test_what_was_trained_under_fsdp_loads_in_one_process(name, starts, fsdp):
    """Pins a checkpoint in pieces that only FSDP can read, and one that is loaded by halves."""
    model = LlavaForConditionalGeneration.from_pretrained(starts["llava"])
    checkpoint = Path(fsdp[name].output_dir, f"checkpoint-{STEPS}")
    if name == "checkpointing":
        with pytest.raises(ValueError, match="accelerate merge-weights"):
            load_weights(model, checkpoint)
        merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(checkpoint))
    load_weights(model, checkpoint)
    assert_weights(model, tensors_of(fsdp[name], "weights"))


@needs_fsdp_on_cpu
def test_a_full_checkpoint_of_fsdp_is_one_for_from_pretrained(fsdp):
    """Pins a LLaVA saved under names that nothing translates back."""
    folder = Path(fsdp["llava"].output_dir, f"checkpoint-{STEPS}")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert_weights(model, tensors_of(fsdp["llava"], "weights"))


# The examples' configurations


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_accelerate_takes_every_configuration(config):
    """Pins fields that accelerate does not know, or that do not go together; it starts nothing here."""
    assert load_config_from_file(str(CONFIGS / config)).num_processes in (2, 8, 16)
    arguments = launcher_arguments(config)
    if not arguments.use_deepspeed:
        assert arguments.use_fsdp == (config == "fsdp2.yaml")
        environment = prepare_multi_gpu_env(arguments)
        assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if config == "two_cpus.yaml" else "bf16")
        return
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == config[len("deepspeed_zero")]


# Mixed precision


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_tables_that_are_resized_keep_their_precision_under_autocast(feature_mode):
    """Pins positions that autocast resizes in bfloat16, and gradients of float32 weights that are rounded."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    pixel_values = pixels(1, 192, 256)  # 3 x 4 tokens, where the tables are laid out for 2 x 2
    gradients, tokens = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            tokens.append(model(pixel_values).last_hidden_state)
        tokens[-1].float().square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert relative_error(tokens[1], tokens[0]) < TOLERANCE[torch.bfloat16]
    assert gradient_errors(gradients[1], gradients[0], TOLERANCE[torch.bfloat16]) == {}
