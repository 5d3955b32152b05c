"""A run: a model is trained and saved, and what was saved reads the held-out pages."""

import copy
import gc
import json
import logging
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from files import replacing
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainerState, set_seed

from deepseek_ocr_vision import DeepSeekOCRVisionModel, ImageTextCollator, resume, save_llava
from deepseek_ocr_vision.composites import IMAGE_TOKEN, build_model
from deepseek_ocr_vision.modeling.threads import fit_threads
from finetuning.arguments import FROZEN, TRAINED, FinetuneArguments, ModelArguments, names_checkpoint_of
from finetuning.processes import on_main_process
from finetuning.schedule import parameter_groups
from finetuning.scores import RunResult


logger = logging.getLogger("finetune")

TOLERANCE = 1e-5  # standard deviations between the tokens of the trained and of the loaded encoder
NUM_REFERENCE_PAGES = 8
NUM_REHEARSED_PAGES = 2
TOWER = "model.vision_tower."


@dataclass
class Job:
    """What all runs share.

    Attributes:
        pages: Pages to train on under `"train"`, and pages to evaluate on under `"held_out"`.
        processor: Makes the model's inputs.
        model_arguments: The model.
        arguments: How to train.
        report: Writes what people look at into a folder, from results.
    """

    pages: dict[str, Dataset]
    processor: LlavaProcessor
    model_arguments: ModelArguments
    arguments: FinetuneArguments
    report: Callable[[list[RunResult], Path, dict[str, Any] | None], None]

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.arguments.output_dir)


class Collator(ImageTextCollator):
    """Makes a batch of pages: the image, and the text to write after it, which alone is trained on."""

    def __call__(self, pages: list[dict]) -> dict[str, torch.Tensor]:
        """Give `pixel_values` [B, 3, H, W], `input_ids`, `attention_mask` and `labels` [B, L]."""
        samples = [{"image": page["image"], "prompt": IMAGE_TOKEN, "answer": page["text"]} for page in pages]
        return super().__call__(samples)


def run(name: str, job: Job) -> RunResult:
    """Train one model, save it, let it read the held-out pages, and keep what came of it.

    A finished run is only loaded.
    """
    folder = job.output / name
    result_file = folder / "result.json"
    is_asked_for = names_checkpoint_of(folder, job.arguments.resume_from_checkpoint)
    if on_main_process(lambda: result_file.is_file() and not is_asked_for):
        logger.info("The run with the encoder %s is finished; keeping it.", name)
        return RunResult.load(result_file)
    logger.info("Training with the encoder %s.", name)
    composite = job.output / "composite" if name == TRAINED else folder / "composite"
    facts = train_and_save(name, job, folder=folder, composite=composite)
    gc.collect()  # what training needed, before the saved model is loaded
    torch.cuda.empty_cache()
    read, written, seconds = read_pages(composite, job, range(len(job.pages["held_out"])))
    facts |= {"seconds_per_page": seconds, "text_tokens_per_vision_token": text_per_vision_token(written, job)}
    result = RunResult(name=name, read=read, written=written, **facts)
    on_main_process(lambda: result.save(result_file))
    if name == FROZEN:  # only its readings are of use
        on_main_process(lambda: shutil.rmtree(composite))
    return result


def train_and_save(name: str, job: Job, *, folder: Path, composite: Path) -> dict[str, Any]:
    """Train a model from its start to its end, save it, and give the facts that its result holds."""
    set_seed(job.arguments.seed)  # both runs start from the same weights
    parts = {"encoder": job.model_arguments.encoder, "language_model": job.model_arguments.language_model}
    model = build_model(job.processor, **parts)
    start = {key: value.clone() for key, value in model.model.vision_tower.state_dict().items()}
    freeze(model.model.vision_tower, name, job.model_arguments.freeze)
    pixels = job.arguments.train_batch_size * math.prod(job.processor.image_processor.size.values())
    fit_threads(model, num_pixels=pixels)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if name == TRAINED:
        on_main_process(lambda: rehearse(model, job))
    trainer = new_trainer(model, job, folder)
    state = train(trainer, job.arguments.resume_from_checkpoint)
    step = saved_step(state)
    loss = held_out_loss(trainer, step)
    # Of all processes, where each holds a part only.
    wrapped = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    weights = trainer.accelerator.get_state_dict(wrapped)
    on_main_process(lambda: save_models(model, weights, job, composite=composite, encoder=encoder_of(name, job)))
    changed = on_main_process(lambda: count_changed(start, weights))
    history = trainer.state.log_history
    facts = {"history": history, "trainable_parameters": trained, "changed_encoder_tensors": changed}
    return facts | {"encoder_tensors": len(start), "step": step, "loss": loss}


def encoder_of(name: str, job: Job) -> Path | None:
    """Where a run's encoder is saved by itself."""
    return job.output / "encoder" if name == TRAINED else None


def freeze(encoder: DeepSeekOCRVisionModel, run_name: str, groups: list[str]) -> None:
    """Freeze what is not to be trained: the whole encoder in the run that compares, else the groups asked for."""
    if run_name == FROZEN:
        encoder.freeze()
    elif groups:
        encoder.freeze(*groups)


# Training


def new_trainer(model: LlavaForConditionalGeneration, job: Job, folder: Path) -> Trainer:
    """transformers' `Trainer` as it is, with checkpoints in a folder, and lower rates for what was trained before."""
    arguments = copy.copy(job.arguments)
    arguments.output_dir = str(folder)
    groups = parameter_groups(model, model_arguments=job.model_arguments, arguments=arguments)
    optimizer = None
    if groups is not None:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = (optimizer_class, options | {"params": groups})
    return Trainer(
        model,
        arguments,
        data_collator=Collator(job.processor),
        train_dataset=job.pages["train"],
        eval_dataset=job.pages["held_out"],
        processing_class=job.processor,
        optimizer_cls_and_kwargs=optimizer,
    )


def train(trainer: Trainer, requested: str | None) -> TrainerState:
    """Train, going on where this run was cut off, and give the state at the end."""
    folder = Path(trainer.args.output_dir)
    return resume(trainer, checkpoint=requested if names_checkpoint_of(folder, requested) else None)


def saved_step(state: TrainerState) -> int:
    """The step whose weights the model has at the end: the last one, or with `--load_best_model_at_end` the best."""
    best = state.best_model_checkpoint
    return state.global_step if best is None else int(Path(best).name.rpartition("-")[2])


def held_out_loss(trainer: Trainer, step: int) -> float:
    """The loss on held-out pages of the model as it is now, after `step`."""
    logged = (entry for entry in trainer.state.log_history if entry["step"] == step and "eval_loss" in entry)
    entry = next(logged, None)
    return entry["eval_loss"] if entry is not None else trainer.evaluate()["eval_loss"]


# Saving


def save_models(
    model: LlavaForConditionalGeneration,
    weights: dict[str, torch.Tensor],
    job: Job,
    *,
    composite: Path,
    encoder: Path | None,
) -> None:
    """Save the composite, and where asked the encoder alone and what it makes of a few pages, each atomically."""
    with replacing(composite) as folder:
        save_llava(model, job.processor, folder, state_dict=weights)
    if encoder is None:
        return
    config = copy.deepcopy(model.config.vision_config)
    tower = {key.removeprefix(TOWER): value.cpu() for key, value in weights.items() if key.startswith(TOWER)}
    alone = DeepSeekOCRVisionModel(config)
    alone.load_state_dict(tower)
    with replacing(encoder) as folder:
        alone.save_pretrained(folder)
        job.processor.image_processor.save_pretrained(folder)
    with replacing(encoder.parent / TRAINED / "reference") as folder:
        save_reference(alone, job.processor, job.pages["held_out"], folder)


@torch.no_grad()
def save_reference(encoder: torch.nn.Module, processor: LlavaProcessor, pages: Dataset, folder: Path) -> None:
    """Save a few pages and the tokens [B, N, C] that the trained encoder makes of them, on the CPU and one by one."""
    folder.mkdir()
    encoder = encoder.float().eval()
    tokens = []
    for index in range(min(NUM_REFERENCE_PAGES, len(pages))):
        image = pages[index]["image"]
        image.save(folder / f"{index}.png")
        pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tokens.append(encoder(pixel_values).last_hidden_state[0])
    save_file({"tokens": torch.stack(tokens)}, folder / "tokens.safetensors")


def count_changed(start: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> int:
    """How many of the encoder's tensors training changed."""
    return sum(not torch.equal(weights[f"{TOWER}{key}"].cpu(), value) for key, value in start.items())


def check_encoder(output: Path) -> dict[str, Any]:
    """Load `encoder/` by the Auto classes in a fresh process, and compare its tokens with the trained encoder's.

    Returns:
        What `load_encoder.py` found; or under `"error"` why it failed.
    """
    script = Path(__file__).parents[1] / "load_encoder.py"
    command = [sys.executable, str(script), str(output / "encoder")]
    command += ["--reference", str(output / TRAINED / "reference")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        return {"error": f"{shlex.join(command)} failed:\n{process.stderr}"}
    return json.loads(process.stdout.splitlines()[-1])


def rehearse(model: LlavaForConditionalGeneration, job: Job) -> None:
    """Do all that the end of a run needs, with the untrained model and a few pages, in a folder that is deleted.

    What fails here would fail after hours otherwise: a disk that is too small, a setting that transformers does not
    save, an image that cannot be drawn.
    """
    logger.info("Trying once what the end needs: saving, reading and the report.")
    job.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.output, prefix=".rehearsal.tmp-") as name:
        folder = Path(name)
        require_space(model, job, folder)
        weights = model.state_dict()
        save_models(model, weights, job, composite=folder / "composite", encoder=folder / "encoder")
        rows = range(min(NUM_REHEARSED_PAGES, len(job.pages["held_out"])))
        saved = LlavaForConditionalGeneration.from_pretrained(folder / "composite")
        read, written = read_with(saved, job, rows, most_tokens=2)
        facts = {"history": [{"step": 0}], "trainable_parameters": 1, "changed_encoder_tensors": 0}
        facts |= {"encoder_tensors": 1, "step": 0, "loss": 0.0, "seconds_per_page": 1.0}
        facts |= {"text_tokens_per_vision_token": text_per_vision_token(written, job)}
        job.report([RunResult(name=TRAINED, read=read, written=written, **facts)], folder, None)


def require_space(model: LlavaForConditionalGeneration, job: Job, folder: Path) -> None:
    """Refuse a disk that will not hold what a run leaves.

    Raises:
        OSError: It is too small.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    states = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = job.arguments.save_total_limit or 10
    checkpoints = sum(1 for _ in job.output.glob("*/checkpoint-*"))
    needed = 2 * weights + max(0, kept + 1 - checkpoints) * (weights + states)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"--output_dir {job.output} has {free / 1e9:.1f} GB left, and a run needs {needed / 1e9:.1f} GB: "
            f"{kept + 1} checkpoints at a time, and the model twice. --save_total_limit decides how many are kept."
        )


# Reading


def text_per_vision_token(texts: list[str], job: Job) -> float:
    """Tokens of the texts of pages, for each token that the encoder makes of them."""
    image_processor, size = job.processor.image_processor, job.processor.image_processor.size
    lengths = [len(ids) for ids in job.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return sum(lengths) / (len(texts) * image_processor.num_image_tokens(size["height"], size["width"]))


def read_pages(composite: Path, job: Job, rows: range) -> tuple[list[str], list[str], float]:
    """Let a saved composite write, greedily, what is on each held-out page; each process reads a part of them.

    Returns:
        What was read and what is written there, in the order of the pages, and the seconds that this process took for
        a page, its share of a batch.
    """
    state = PartialState()
    model = LlavaForConditionalGeneration.from_pretrained(composite).to(state.device)
    part = rows[state.process_index :: state.num_processes]
    start = time.perf_counter()
    read, written = read_with(model, job, part)
    seconds = (time.perf_counter() - start) / max(1, len(part))
    gathered = gather_object(list(zip(part, read, written, strict=True)))
    ordered = sorted(gathered)
    return [text for _, text, _ in ordered], [text for _, _, text in ordered], seconds


@torch.no_grad()
def read_with(
    model: LlavaForConditionalGeneration, job: Job, rows: range, *, most_tokens: int | None = None
) -> tuple[list[str], list[str]]:
    """Let a model read held-out pages; give what it read and what is written there."""
    model.eval()
    pages, processor, size = job.pages["held_out"], job.processor, job.arguments.eval_batch_size
    starts = range(0, len(rows), size)
    is_quiet = job.arguments.disable_tqdm or not PartialState().is_main_process or most_tokens is not None
    read, written = [], []
    for start in tqdm(starts, desc="Reading held-out pages", disable=is_quiet):
        batch = [pages[row] for row in rows[start : start + size]]
        texts = [page["text"] for page in batch]
        token_ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        # A little longer than each text, so that one who reads too much is caught, whatever shares its batch.
        limits = [most_tokens or len(ids) + 8 for ids in token_ids]
        images = [page["image"] for page in batch]
        inputs = processor(images=images, text=[IMAGE_TOKEN] * len(batch), return_tensors="pt")
        output = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=max(limits))
        rows_written = output[:, inputs["input_ids"].shape[1] :]
        new_tokens = [row[:limit] for row, limit in zip(rows_written, limits, strict=True)]
        read += processor.batch_decode(new_tokens, skip_special_tokens=True)
        written += texts
    return read, written
