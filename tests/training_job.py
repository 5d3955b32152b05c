"""A small training run as a function, for tests that start it in processes of its own, and kill those.

accelerate launch ... tests/training_job.py '{"output_dir": ...}'   # a job, or a list of jobs to do in turn
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from PIL import Image, ImageDraw
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments


sys.path[:0] = [str(Path(__file__).parent)]

import whole_model  # noqa: E402
from helpers import pixels, tiny_config  # noqa: E402

from deepseek_ocr_vision import DeepSeekOCRVisionModel  # noqa: E402
from deepseek_ocr_vision.composites import IMAGE_TOKEN, build_model, build_processor  # noqa: E402
from deepseek_ocr_vision.training.collator import ImageTextCollator  # noqa: E402
from deepseek_ocr_vision.training.resuming import resume  # noqa: E402


TIME_LIMIT = 120
"""Seconds after which a process that should be done counts as hanging."""


NUM_SAMPLES = 12

PRELOADED = [
    *("deepseek_ocr_vision.training.resuming", "transformers.trainer", "torch.distributed.fsdp"),
    *("transformers.models.llava", "transformers.models.llama.modeling_llama"),
]
"""What takes longest to import, and can be found without a path to the tests."""


needs_fsdp_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="FSDP2 of this torch, 2.6 among them, calls methods that streams of a CPU do not have",
)


@dataclass
class Job:
    """What to train and how.

    Attributes:
        output_dir: Where checkpoints go, and `result.json` and `tensors.pt` at the end.
        model: `"classifier"`, the tiny encoder with a linear head, `"llava"`, a small composite, or
            `"deepseek_ocr"`, a tiny whole model.
        arguments: Further fields of `TrainingArguments`.
        dropout: Of the language model's attention, so that losses depend on the random numbers.
        images: Whether all samples have one; of the odd samples otherwise none has.
        start_from: A checkpoint of the model, or of the classifier's encoder, to start from instead of new weights.
        fsdp: Whether accelerate is to take these CPUs for GPUs, as it has FSDP for GPUs alone.
        environment: Variables that a launcher would set, such as what FSDP is to do.
        kill: Process and place of its death: a step, in the middle of it, or a file of a checkpoint.
    """

    output_dir: str
    model: str = "llava"
    arguments: dict = field(default_factory=dict)
    dropout: float = 0.0
    images: bool = True
    start_from: str | None = None
    fsdp: bool = False
    environment: dict = field(default_factory=dict)
    kill: tuple[int, int | str] | None = None


class Classifier(nn.Module):
    """The encoder in somebody's own small model."""

    _no_split_modules = DeepSeekOCRVisionModel._no_split_modules

    def __init__(self, start_from: str | None):
        super().__init__()
        new = DeepSeekOCRVisionModel(tiny_config())
        self.encoder = DeepSeekOCRVisionModel.from_pretrained(start_from) if start_from else new
        self.head = nn.Linear(self.encoder.config.hidden_size, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.encoder(pixel_values).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(job: Job) -> Trainer:
    """Everything from the same seed, in whatever process."""
    defaults = {
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    os.environ |= job.environment
    arguments = TrainingArguments(output_dir=job.output_dir, **(defaults | job.arguments))
    if job.fsdp:
        PartialState().distributed_type = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    if job.model == "classifier":
        samples = [{"pixel_values": page, "labels": index % 3} for index, page in enumerate(pixels(NUM_SAMPLES))]
        return Trainer(Classifier(job.start_from), arguments, train_dataset=samples, eval_dataset=samples)
    if job.model == "deepseek_ocr":
        # A load-balancing loss depends on padding, and so on how the samples are spread over processes.
        model, processor = whole_model.tiny_whole_model(aux_loss_alpha=0.0), whole_model.tiny_processor()
    else:
        processor = build_processor(page_size=128)
        model = build_model(processor)
    if job.start_from:
        model = type(model).from_pretrained(job.start_from)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = job.dropout
    samples = [sample(index, has_image=job.images or index % 2 == 0) for index in range(NUM_SAMPLES)]
    datasets = {"train_dataset": samples, "eval_dataset": samples}
    return Trainer(model, arguments, data_collator=Collator(processor), processing_class=processor, **datasets)


class Collator(ImageTextCollator):
    """Remembers which batches had an image."""

    def __init__(self, processor):
        super().__init__(processor)
        self.had_image: list[bool] = []

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        self.had_image.append(any("images" in sample for sample in samples))
        return super().__call__(samples)


def sample(index: int, *, has_image: bool) -> dict:
    """A number, drawn on a page or not."""
    if not has_image:
        return {"prompt": "Count: ", "answer": f"{index} {index + 1}"}
    page = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(page).text((20 + index, 30), str(index), fill="black", font_size=60)
    return {"images": [page], "prompt": IMAGE_TOKEN, "answer": str(index)}


class Gradients(TrainerCallback):
    """Keeps the first step's gradients, whole."""

    def __init__(self):
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, arguments, state, control, *, model, **_):
        if not self.first:
            self.first = whole({name: parameter.grad for name, parameter in model.named_parameters()})


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors, put together where FSDP has them in pieces, without what its checkpointing adds to names."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): getattr(tensor, "full_tensor", tensor.clone)()
        for name, tensor in tensors.items()
    }


def run(job: Job) -> None:
    """Train, or go on training, and leave what came of it."""
    trainer = trainer_of(job)
    gradients = Gradients()
    trainer.add_callback(gradients)
    with dying(job.kill, trainer):
        state = resume(trainer)
    had_image = gather_object([getattr(trainer.data_collator, "had_image", [])])
    weights = whole({name: parameter.detach() for name, parameter in trainer.model.named_parameters()})
    if trainer.is_world_process_zero():
        kept = ("step", "loss", "grad_norm", "learning_rate")
        log = [{key: entry[key] for key in kept} for entry in state.log_history if "loss" in entry]
        result = {"log": log, "units": units(trainer.model), "had_image": had_image}
        torch.save({"gradients": gradients.first, "weights": weights}, Path(job.output_dir) / "tensors.pt")
        (Path(job.output_dir) / "result.json").write_text(json.dumps(result))


def units(model: nn.Module) -> list[str]:
    """The classes that FSDP shards by themselves."""
    modules = [module for module in model.modules() if isinstance(module, torch.distributed.fsdp.FSDPModule)]
    return sorted({type(module).__name__.removeprefix("FSDP") for module in modules})


def result_of(job: Job) -> dict:
    """What a job left."""
    return json.loads((Path(job.output_dir) / "result.json").read_text())


def tensors_of(job: Job, kind: str) -> dict[str, torch.Tensor]:
    """A job's `"gradients"` of its first step, or its `"weights"` at the end."""
    return torch.load(Path(job.output_dir) / "tensors.pt")[kind]


# Dying


@contextmanager
def dying(kill: tuple[int, int | str] | None, trainer: Trainer) -> Iterator[None]:
    """Have the process kill itself at a step, or after half of a file."""
    if kill is None or kill[0] != trainer.args.process_index:
        yield
        return
    place = kill[1]
    trainer.add_callback(DieAtStep(place))
    torch.save = after_half_a_file(torch.save, place)
    transformers.modeling_utils.safe_save_file = after_half_a_file(transformers.modeling_utils.safe_save_file, place)
    TrainerState.save_to_json = after_half_a_file(TrainerState.save_to_json, place)
    yield
    raise AssertionError(f"It outlived {place}.")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAtStep(TrainerCallback):
    """Kills the process in the middle of a step, between backward pass and optimizer."""

    def __init__(self, step: int | str):
        self.step = step

    def on_pre_optimizer_step(self, arguments, state, control, **_):
        if state.global_step == self.step:
            die()

    def on_save(self, arguments, state, control, **_):
        if self.step == f"after checkpoint-{state.global_step}":
            die()


def after_half_a_file(write, place: int | str):
    """A function that writes as another does, but dies in the middle of one file."""

    def write_or_die(content, path, *arguments, **options):
        write(content, path, *arguments, **options)
        if isinstance(place, str) and str(path).endswith(place):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    return write_or_die


# Processes


def start(*jobs: Job, num_processes: int = 1) -> list[int]:
    """Do jobs in fresh processes, and give their exit codes; a negative one is the signal that ended it.

    A server that has everything imported forks them, or each would take seconds to begin.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=run_as, args=(jobs, rank, num_processes, port)) for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIME_LIMIT)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def run_as(jobs: tuple[Job, ...], rank: int, num_processes: int, port: int) -> None:
    """Do jobs as one of several processes, as a launcher would start it."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if num_processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for job in jobs:
        run(job)


def as_json(*jobs: Job) -> str:
    """Jobs as an argument for the command line."""
    return json.dumps([asdict(job) for job in jobs])


if __name__ == "__main__":
    for fields in json.loads(sys.argv[1]):
        run(Job(**fields))
