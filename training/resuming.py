"""Runs that a kill cannot lose: which checkpoint of transformers' `Trainer` is whole, and how to go on from it.

`Trainer` writes a checkpoint file by file, straight into its folder, and takes the newest folder when it resumes. It
knows nothing of a folder whose writing was cut off. And it loads weights by `load_state_dict(..., strict=False)`,
which for a LLaVA finds no name it knows: transformers saves composites under the names of their first releases, such
as `language_model.model.layers`, and only `from_pretrained` translates them. Both are mended here, around a `Trainer`
that stays as it is.
"""

import functools
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import list_some


if TYPE_CHECKING:
    # Whoever has a `Trainer` has imported it; others need not wait for it.
    from transformers import Trainer, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
"""What `Trainer` writes last."""

_PREFIX = "checkpoint-"
_CONVERTED_BY = {
    "FSDP's sharded state dict": "accelerate merge-weights {0}/pytorch_model_fsdp_0 {0}",
    "DeepSpeed's": "python {0}/zero_to_fp32.py {0} {0} --safe_serialization",
}
"""What accelerate and DeepSpeed make files for one process with."""
_ARCHIVES = ("optimizer*.bin", "pytorch_model*.bin", "adapter_model.bin", "training_args.bin")


# Which checkpoint is whole


def last_complete_checkpoint(output_dir: str | os.PathLike, *, num_processes: int | None = None) -> str | None:
    """Find the newest checkpoint of a run that was written to its end.

    transformers' `get_last_checkpoint` gives the newest folder, whatever is in it.

    Args:
        output_dir: The run's folder, where `Trainer` writes `checkpoint-<step>`. With several processes, all of them
            have to see the same one.
        num_processes: How many processes will go on from it; each needs the random state that its predecessor saved.
            By default as many as take part now.

    Returns:
        The folder, for `Trainer.train(resume_from_checkpoint=...)`, or `None` if there is none to go on from.

    Raises:
        ValueError: Checkpoints are there and whole, but of fewer processes, and none is left. Starting anew would
            overwrite them.
    """
    num_processes = _processes_now() if num_processes is None else num_processes
    of_fewer_processes = []
    for folder in _checkpoints(Path(output_dir)):
        reason = why_incomplete(folder, num_processes=num_processes)
        if reason is None:
            return str(folder)
        if why_incomplete(folder, num_processes=1) is None:
            of_fewer_processes.append(folder)
        logger.warning("Passing over %s: %s.", folder, reason)
    if of_fewer_processes:
        raise ValueError(
            f"{of_fewer_processes[0]} does not hold the states of `num_processes` {num_processes}. If fewer processes "
            "wrote it, `num_processes=1` finds it, and random numbers, where the model draws any, will be others. If "
            "it was cut off while the processes saved theirs, delete it to start anew."
        )
    return None


def why_incomplete(checkpoint: str | os.PathLike, *, num_processes: int = 1) -> str | None:
    """Say what is missing from a checkpoint, or cut off in it, so that no run can go on from it.

    Args:
        checkpoint: A folder that `Trainer` wrote: by one process, under DDP, FSDP or DeepSpeed.
        num_processes: How many processes will go on from it.

    Returns:
        A reason that names the file, or `None` if everything is there.
    """
    return next(_faults(Path(checkpoint), num_processes), None)


def _faults(folder: Path, num_processes: int) -> Iterator[str]:
    """All that is missing or cut off."""
    yield from _faults_of_state(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        # Saves that were interrupted leave hidden folders.
        if not any(part.startswith(".") for part in file.relative_to(folder).parent.parts):
            yield from _faults_of_file(file)
    yield from _faults_of_weights(folder)
    yield from _faults_of_optimizer(folder, num_processes)
    if not (folder / "rng_state.pth").is_file():
        # Each process saves its own, the others after process 0 has written its files.
        names = [f"rng_state_{index}.pth" for index in range(num_processes)]
        yield from (f"{name} is missing" for name in names if not (folder / name).is_file())


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folders named after a step, the newest first."""
    steps = {path.name.removeprefix(_PREFIX): path for path in output_dir.glob(f"{_PREFIX}*") if path.is_dir()}
    return [steps[step] for step in sorted(filter(str.isdecimal, steps), key=int, reverse=True)]


def _processes_now() -> int:
    """How many processes take part: those that can talk to each other, or those that a launcher is about to start."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _faults_of_state(folder: Path) -> Iterator[str]:
    try:
        step = json.loads((folder / STATE_FILE).read_text("utf-8"))["global_step"]
    except (OSError, ValueError, TypeError, KeyError):
        yield f"{STATE_FILE}, which is written last, is not there or cut off"
    else:
        if folder.name.startswith(_PREFIX) and folder.name != f"{_PREFIX}{step}":
            yield f"{STATE_FILE} is that of step {step}"


def _faults_of_file(file: Path) -> Iterator[str]:
    """Whether a file that tells its own length ends there: safetensors, and the zip archives that PyTorch writes."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return
        if file.suffix in (".pt", ".pth") or any(file.match(name) for name in _ARCHIVES):
            with zipfile.ZipFile(file):
                return
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        yield f"{file.name} is cut off ({error})"


def _faults_of_weights(folder: Path) -> Iterator[str]:
    """Whether the weights are there, in one of the forms of `_weights_in`, with all their shards."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            yield f"{index.name} is cut off"
        else:
            yield from (f"{shard} is missing" for shard in sorted(named) if not (folder / shard).is_file())
    if any(folder.glob("model-*-of-*.safetensors")) and not (folder / "model.safetensors.index.json").is_file():
        yield "model.safetensors.index.json is missing"
    if not _weights_in(folder):
        yield "there are no weights"


def _weights_in(folder: Path) -> str | None:
    """The form in which a checkpoint holds the weights."""
    forms = {
        "safetensors": ("model.safetensors", "model.safetensors.index.json"),
        "adapter": ("adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.safetensors"),
        "fsdp": ("pytorch_model_fsdp.bin",),
        # PyTorch writes this file once all processes have written their shards.
        "FSDP's sharded state dict": ("pytorch_model_fsdp_0/.metadata",),
        "DeepSpeed's": ("latest",),
    }
    return next((form for form, names in forms.items() if any(any(folder.glob(name)) for name in names)), None)


def _faults_of_optimizer(folder: Path, num_processes: int) -> Iterator[str]:
    """Whether the optimizer's state is there, and the schedule's, which DeepSpeed may keep with the optimizer's."""
    latest = folder / "latest"
    if latest.is_file():
        shards = folder / latest.read_text("utf-8").strip()
        for index in range(num_processes):
            if not any(shards.glob(f"*zero_pp_rank_{index}_*optim_states.pt")):
                yield f"DeepSpeed's optimizer state of process {index} is missing from {shards.name}"
        return
    if not any((folder / name).is_file() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata")):
        yield "there is no optimizer state; with `save_only_model` none is written"
    if not (folder / "scheduler.pt").is_file():
        yield "scheduler.pt is missing"


# Weights


def make_resumable(model: nn.Module) -> nn.Module:
    """Let a model load the names that it is saved under, wherever its `load_state_dict` is called.

    With it `Trainer.train(resume_from_checkpoint=...)` and `load_best_model_at_end` load the weights of a LLaVA, which
    they otherwise do not, under a warning of missing keys. Weights that are not the model's are an error. Nothing
    changes for a model whose names are the same in memory and on disk, such as the encoder alone.

    Args:
        model: The model, or a module with transformers' models somewhere in it. It gets a hook that stays.

    Returns:
        The model itself.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = {id(part) for module in models for part in module.modules() if part is not module}
    for module in models:
        if id(module) not in inner:
            module.register_load_state_dict_pre_hook(_translate_names)
    return model


def _translate_names(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], prefix: str, *accounts: Any) -> None:
    """Replace names as saved by those in memory, in place; called by `load_state_dict` before it looks for them."""
    error_msgs = accounts[-1]
    saved = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
    known = model.state_dict().keys()
    if saved.keys() <= known:
        return
    translated, faults = _translated(model, {name: state_dict[key] for name, key in saved.items()})
    if faults:
        # PyTorch raises for these, also where its caller is not strict.
        error_msgs.append(f"These weights are not those of {type(model).__name__}: {faults}.")
        return
    for key in saved.values():
        del state_dict[key]
    state_dict.update({f"{prefix}{name}": tensor for name, tensor in translated.items()})


def _translated(
    model: PreTrainedModel, weights: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str | None]:
    """Weights under their names in memory, and what is wrong with them. They are not copied, and may be a part of all.

    Only `from_pretrained` knows how to translate, so it makes a second model around them.
    """
    # Left to itself it would round float32 weights to the dtype that the configuration was once loaded with.
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype}
    model_class: Any = type(model)
    loaded, info = model_class.from_pretrained(None, config=model.config, state_dict=weights, **options)
    foreign = sorted(info["unexpected_keys"])
    # Entries are (name, shape found, shape expected).
    foreign += sorted(f"{entry[0]} of shape {tuple(entry[1])}" for entry in info["mismatched_keys"])
    missing = set(info["missing_keys"])
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if name not in missing}
    return tensors, f"no place for {list_some(foreign)}" if foreign else None


def load_weights(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Load the weights of a checkpoint that `Trainer` wrote into a model in one process.

    Takes what `save_pretrained` writes, in one file or several; FSDP's full state dict; and an adapter, where the
    model is one of peft's. What FSDP and DeepSpeed write in a part for each process has to be converted by their own
    tools first, which the error names.

    Args:
        model: The model as it was before anything wrapped it.
        checkpoint: The folder.

    Raises:
        ValueError: There are no weights, they are in a part for each process, or they are not exactly those of this
            model; the message names the first.
    """
    folder = Path(checkpoint)
    form = _weights_in(folder)
    if form is None:
        raise ValueError(f"`checkpoint` {folder} holds no weights that are known here.")
    if form == "adapter":
        return _load_adapter(model, folder)
    weights = {name: tensor for part in _read_weights(folder, form) for name, tensor in part.items()}
    if isinstance(model, PreTrainedModel):
        weights, fault = _translated(model, weights)
        if fault is not None:
            raise ValueError(f"`checkpoint` {folder} is not of this {type(model).__name__}: {fault}.")
    own = model.state_dict().keys()
    for names, fault in ((own - weights.keys(), "lacks"), (weights.keys() - own, "holds besides")):
        if names:
            listed = list_some(sorted(names))
            raise ValueError(f"`checkpoint` {folder} is not of this {type(model).__name__}: it {fault} {listed}.")
    model.load_state_dict(weights)
    return None


def _read_weights(folder: Path, form: str) -> Iterator[dict[str, torch.Tensor]]:
    """A checkpoint's tensors, file by file."""
    if form in _CONVERTED_BY:
        raise ValueError(
            f"`checkpoint` {folder} is {form}, in a part for each process. `{_CONVERTED_BY[form].format(folder)}` "
            "makes one file of safetensors of it, which is read here."
        )
    if form == "fsdp":
        yield torch.load(folder / "pytorch_model_fsdp.bin", map_location="cpu", weights_only=True, mmap=True)
    else:
        shards = sorted(folder.glob("model-*-of-*.safetensors"))
        yield from (load_file(file) for file in shards or [folder / "model.safetensors"])


def _load_adapter(model: Any, folder: Path) -> None:
    """Load an adapter of peft into the model's active one."""
    if not hasattr(model, "load_adapter") or not hasattr(model, "active_adapter"):
        raise ValueError(
            f"`checkpoint` {folder} holds an adapter, and the model is a {type(model).__name__}; it has to be peft's."
        )
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)


# Going on


def resume(trainer: "Trainer", *, checkpoint: str | os.PathLike | None = None) -> "TrainerState":
    """Train, going on where the run was cut off; the losses are those of a run that never was.

    Goes on from the newest complete checkpoint in `trainer.args.output_dir`, and starts where there is none. A run
    whose last step is saved is only loaded; `Trainer` would take one step more.

    Args:
        trainer: A `Trainer` as it is, with the model that it is to train from the start.
        checkpoint: Another checkpoint to go on from, the last one of its run.

    Returns:
        The state at the end, with the log of the whole run. The weights are in `trainer.model`.

    Raises:
        ValueError: `checkpoint` is not complete, or later ones are in its folder; its weights are not those of the
            model; or `trainer` makes its model by `model_init`.
    """
    if trainer.model_init is not None:
        raise ValueError("`trainer` has a `model_init`, which makes a new model at every start; give it a `model`.")
    make_resumable(trainer.model)
    found = _checkpoint_to_resume(trainer.args, checkpoint)
    if found is None:
        trainer.train()
        return trainer.state
    logger.info("Going on from %s.", found)
    state = type(trainer.state).load_from_json(os.path.join(found, STATE_FILE))
    beside = Path(found).parent / Path(state.best_model_checkpoint or "").name
    if state.best_model_checkpoint is not None and beside.is_dir():
        state.best_model_checkpoint = str(beside)  # of this folder, which may have been moved since
    if _is_finished(state, trainer.args):
        wants_best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
        load_weights(trainer.model, state.best_model_checkpoint if wants_best else found)
        trainer.state = state
        return state
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        # `Trainer` does so too, but is content with a warning where weights are missing.
        load_weights(trainer.model, found)
    trainer.train(resume_from_checkpoint=found)
    return trainer.state


def _checkpoint_to_resume(arguments: "TrainingArguments", requested: str | os.PathLike | None) -> str | None:
    """The checkpoint asked for if a run can go on from it, or the newest one that is whole."""
    if requested is None:
        return last_complete_checkpoint(str(arguments.output_dir), num_processes=arguments.world_size)
    reason = why_incomplete(requested, num_processes=arguments.world_size)
    if reason is not None:
        raise ValueError(f"`checkpoint` {requested} is not complete: {reason}.")
    newest = last_complete_checkpoint(Path(requested).parent, num_processes=arguments.world_size)
    if newest is not None and Path(newest).resolve() != Path(requested).resolve():
        # They would be overwritten one file at a time, and a kill in between would leave a mixture of two runs.
        raise ValueError(f"`checkpoint` {requested} has later ones beside it, such as {newest}; move them away first.")
    return str(requested)


def _is_finished(state: "TrainerState", arguments: "TrainingArguments") -> bool:
    """Whether a run has done all that its arguments, which may ask for more than they once did, ask for."""
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    return state.epoch is not None and state.epoch >= arguments.num_train_epochs
