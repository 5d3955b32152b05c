"""How many steps, and at which rates: what suits the number of pages, their size, and what was trained before."""

import logging
import math
from typing import Any

from transformers import LlavaForConditionalGeneration

from deepseek_ocr_vision import layer_decay_groups
from finetuning.arguments import FinetuneArguments, ModelArguments


logger = logging.getLogger("finetune")

HANDWRITTEN_STEPS = 1100
LEAST_EPOCHS, WANTED_STEPS = 3, 1000
FEW_STEPS = 50
LARGEST_BATCH, SMALLEST_BATCH = 32, 2
SMALL_PAGE = 256  # pixels; up to this size a batch is the largest
ENCODER_PART, LANGUAGE_MODEL_PART = 1 / 20, 1 / 50  # of the rate of what is new


def fit_to_data(arguments: FinetuneArguments, *, num_pages: int, page_size: int, is_own: bool) -> None:
    """Set what depends on the pages, in place: batch sizes, the number of steps, and shares of it as whole numbers.

    Args:
        arguments: How to train.
        num_pages: Pages to train on.
        page_size: Side of a page in pixels.
        is_own: Whether they are the user's own.
    """
    if not arguments.per_device_train_batch_size:
        fitting = math.floor(LARGEST_BATCH * (SMALL_PAGE / page_size) ** 2)
        arguments.per_device_train_batch_size = min(LARGEST_BATCH, max(SMALLEST_BATCH, fitting), num_pages)
    if not arguments.per_device_eval_batch_size:
        arguments.per_device_eval_batch_size = 3 * arguments.per_device_train_batch_size
    per_epoch = steps_per_epoch(arguments, num_pages)
    if arguments.max_steps <= 0 and arguments.num_train_epochs <= 0:
        arguments.max_steps = max(LEAST_EPOCHS * per_epoch, WANTED_STEPS) if is_own else HANDWRITTEN_STEPS
    is_counted = arguments.max_steps > 0
    steps = arguments.max_steps if is_counted else math.ceil(per_epoch * arguments.num_train_epochs)
    set_shares(arguments, steps)
    say_what_is_done(arguments, steps=steps, per_epoch=per_epoch)


def steps_per_epoch(arguments: FinetuneArguments, num_pages: int) -> int:
    """Optimizer steps in which all processes together see each page once."""
    at_once = arguments.train_batch_size * arguments.world_size
    batches = num_pages // at_once if arguments.dataloader_drop_last else math.ceil(num_pages / at_once)
    return max(1, math.ceil(batches / arguments.gradient_accumulation_steps))


def set_shares(arguments: FinetuneArguments, steps: int) -> None:
    """Turn shares of all steps into numbers of steps. A loss is logged as a mean, so a checkpoint falls on a log."""
    arguments.warmup_steps = number_of(arguments.warmup_steps, steps) if arguments.warmup_steps else 0
    arguments.logging_steps = number_of(arguments.logging_steps, steps)
    for name in ("eval_steps", "save_steps"):
        given = getattr(arguments, name)
        if given is not None:
            of_a_log = arguments.logging_steps if given < 1 else 1
            setattr(arguments, name, of_a_log * math.ceil(number_of(given, steps) / of_a_log))
    if arguments.save_steps % arguments.logging_steps:
        logger.warning(
            "--save_steps %d is no multiple of --logging_steps %d: the first loss logged after a resume is a mean of "
            "fewer steps than that of a run that was never cut off.",
            arguments.save_steps,
            arguments.logging_steps,
        )


def number_of(given: float, steps: int) -> int:
    """A number of steps, given as such or as a share of all."""
    return int(given) if given >= 1 else max(1, math.ceil(given * steps))


def say_what_is_done(arguments: FinetuneArguments, *, steps: int, per_epoch: int) -> None:
    """Say how long a run will be, and warn if it will learn little."""
    batch = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    epochs = steps / per_epoch
    logger.info("Each run makes %d steps of %d pages: every page is seen %.1f times.", steps, batch, epochs)
    if steps < FEW_STEPS:
        logger.warning(
            "%d steps are few; a model learns little in fewer than %d. Give --num_train_epochs or --max_steps, or a "
            "smaller --per_device_train_batch_size.",
            steps,
            FEW_STEPS,
        )


# Rates


def parameter_groups(
    model: LlavaForConditionalGeneration, *, model_arguments: ModelArguments, arguments: FinetuneArguments
) -> list[dict[str, Any]] | None:
    """What is trained, in groups of different learning rates, what is new first; `None` if all have one rate.

    A pretrained part gets a lower rate, or the first steps, made for a projector that knows nothing yet, undo what it
    knows. The encoder's falls from layer group to layer group towards the pixels.
    """
    encoder_rate, language_rate = rates(model_arguments, arguments)
    is_pretrained = model_arguments.encoder is not None
    if encoder_rate == language_rate == arguments.learning_rate and not is_pretrained:
        return None
    layer_decay = model_arguments.layer_decay if is_pretrained else 1.0
    top = encoder_rate / layer_decay  # so that the last layer group gets the rate asked for
    groups = layer_decay_groups(model, learning_rate=top, layer_decay=layer_decay, weight_decay=arguments.weight_decay)
    language = {id(parameter) for parameter in model.model.language_model.parameters()}
    language |= {id(parameter) for parameter in model.lm_head.parameters()}
    parts: list[dict[str, Any]] = []
    for group in groups:
        if group["name"] != "other":
            parts.append(group)
            continue
        for name, rate, is_language in (("new", arguments.learning_rate, False), ("language", language_rate, True)):
            members = [parameter for parameter in group["params"] if (id(parameter) in language) is is_language]
            if members:
                parts.append(group | {"name": name, "lr": rate, "params": members})
    return sorted(parts, key=lambda part: part["name"] != "new")  # Trainer logs the rate of the first group


def rates(model_arguments: ModelArguments, arguments: FinetuneArguments) -> tuple[float, float]:
    """The learning rates of the encoder and of the language model."""
    found = []
    for given, checkpoint, part in (
        (model_arguments.encoder_learning_rate, model_arguments.encoder, ENCODER_PART),
        (model_arguments.language_model_learning_rate, model_arguments.language_model, LANGUAGE_MODEL_PART),
    ):
        default = arguments.learning_rate * (part if checkpoint is not None else 1)
        found.append(default if given is None else given)
    return found[0], found[1]
