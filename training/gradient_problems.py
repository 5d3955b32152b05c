"""What is wrong with the gradients of a model, in words."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch
from torch import nn

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import list_some

from .gradient_rows import GradientRow, gradient_norm, local_part


NUM_NAMES = 3
"""Parameters that a sentence names before it only counts them."""

Parameters = dict[str, nn.Parameter]


def problems_of(
    rows: list[GradientRow], parameters: Parameters, *, loss: torch.Tensor | None, stale: frozenset[int]
) -> list[str]:
    """Everything that is wrong, the cause before its consequences.

    `loss` is what was backpropagated, or should have been; `stale` names parameters, by `id`, whose gradient is of an
    earlier step.
    """
    unusable = list(_parameter_problems(parameters))
    return [
        *_nothing_to_train(rows),
        *_loss_problems(rows, loss),
        *(unusable or _missing_problems(rows, loss)),
        *_zero_problems(rows, parameters),
        *_non_finite_problems(rows, parameters),
        *_stale_problems(parameters, stale),
    ]


def notes_of(rows: list[GradientRow]) -> list[str]:
    """What is unusual and may be meant so."""
    return [*_frozen_notes(rows), *_zero_notes(rows)]


# The loss and the parameters


def _nothing_to_train(rows: list[GradientRow]) -> Iterator[str]:
    if not any(row.trainable for row in rows):
        yield (
            "Every parameter is frozen: there is nothing to train, and the loss has no `grad_fn`. Set "
            "`requires_grad_()` on what is to learn; an encoder has `unfreeze()`."
        )


def _loss_problems(rows: list[GradientRow], loss: torch.Tensor | None) -> Iterator[str]:
    """What is wrong with the loss itself: no way back from it, or no number."""
    if loss is None or loss.is_meta:
        return
    num_trainable = sum(row.trainable for row in rows)
    if loss.is_inference():
        yield (
            "The loss was computed under `torch.inference_mode()`, where autograd records nothing. Compute it "
            "outside; `clone()` afterwards makes an ordinary tensor of it, but brings no gradient back."
        )
    elif loss.requires_grad and loss.grad_fn is None:
        yield (
            "The loss requires a gradient but was computed from nothing: `requires_grad_()` or `torch.tensor(...)` "
            "made it anew, which silences the error and trains nothing. Give the loss as the model computed it."
        )
    elif num_trainable and not loss.requires_grad:
        yield (
            f"The loss has no `grad_fn`, though {num_trainable} parameters are trainable: it was computed under "
            "`torch.no_grad()`, from tensors that were detached or made under it, from numbers (`item()`, "
            "`argmax()`), or by reentrant gradient checkpointing of layers whose input needs no gradient."
        )
    if not loss.detach().isfinite().item():
        why = "the forward pass has left the range of its numbers, or weights or images are not finite to begin with."
        if _are_all_zero(rows):
            why = "the cross entropy of a batch in which every label is -100 is so, and its gradients are zero."
        yield f"The loss is {loss.item()}: {why}"


def _are_all_zero(rows: list[GradientRow]) -> bool:
    """Whether there are gradients and all of them are zero."""
    reached = [row for row in rows if row.trainable and not row.is_unreached]
    return bool(reached) and not any(row.with_gradient or row.non_finite for row in reached)


def _parameter_problems(parameters: Parameters) -> Iterator[str]:
    """Parameters that cannot be trained as they are."""
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if made_in_inference := [name for name, parameter in trainable.items() if parameter.is_inference()]:
        yield (
            f"{_names(made_in_inference)}: made or loaded under `torch.inference_mode()`, and so not to be trained: "
            '"Inference tensors cannot be saved for backward". Build the model outside of it.'
        )
    if without_values := [name for name, parameter in trainable.items() if parameter.is_meta]:
        yield f"{_names(without_values)}: on the meta device, without values; load the weights first."


# Missing


def _missing_problems(rows: list[GradientRow], loss: torch.Tensor | None) -> Iterator[str]:
    """Where gradients do not arrive: nowhere, not beyond some place, or not everywhere in a group."""
    rows = [row for row in rows if row.trainable]
    if rows and all(row.is_unreached for row in rows):
        yield from _nothing_arrives(loss)
        return
    runs = list(_runs(rows, lambda row: row.is_unreached))
    for index, (is_unreached, run) in enumerate(runs):
        if is_unreached:
            following = runs[index + 1][1][0] if index + 1 < len(runs) else None
            yield _cut(rows, run, following) if index == 0 and following else _passed_by(run, following)
    for row in rows:
        if row.missing and not row.is_unreached:
            yield (
                f"{len(row.missing)} of {row.trainable} parameters of `{row.name}` have no gradient, "
                f"{_names(row.missing)}: the forward pass did not use them. DistributedDataParallel stops at such."
            )


def _nothing_arrives(loss: torch.Tensor | None) -> Iterator[str]:
    """Words for a model without any gradient, if the loss itself does not explain it."""
    if loss is None:
        yield (
            "No parameter has a gradient: call this between `loss.backward()` and `zero_grad()`, or give it the loss. "
            "A model that gets no labels has `None` for its loss."
        )
    elif loss.grad_fn is not None:
        yield (
            "No parameter has a gradient: the loss depends on other parameters, of another model or of a copy, or "
            "gradients were cleared since its backward pass."
        )


def _cut(rows: list[GradientRow], run: list[GradientRow], following: GradientRow) -> str:
    """Words for the first groups of the data, up to a place that no gradient gets past."""
    get, them = ("gets", "it") if len(run) == 1 else ("get", "them")
    begin = f"{_groups(run)} {get} no gradient, though `{following.name}` after {them} does:"
    if _holds_encoder(rows, run) and run[-1].encoder is None:
        # What reads the tokens gets none either, so nothing of the images is in the loss.
        return f"{begin} the batch has no images, or what becomes of their tokens is detached behind `{run[-1].name}`."
    images = ", or the batch has no images" if _holds_encoder(rows, run) else ""
    return (
        f"{begin} the path is cut between `{run[-1].name}` and `{following.name}`. There is `torch.no_grad()`, "
        f"`detach()` or a detour through numpy{images}."
    )


def _passed_by(run: list[GradientRow], following: GradientRow | None) -> str:
    """Words for groups without gradient behind others that have one."""
    get, they = ("gets", "it") if len(run) == 1 else ("get", "they")
    if following is None:
        return f"{_groups(run)} {get} no gradient, though what comes before does: {they} had no part in the loss."
    return (
        f"{_groups(run)} {get} no gradient, though what comes before and after does: the forward pass goes past, or "
        f"the path is cut between `{run[-1].name}` and `{following.name}`."
    )


def _holds_encoder(rows: list[GradientRow], run: list[GradientRow]) -> bool:
    """Whether all that is trained of some encoder is in a run of rows."""
    encoders = {row.encoder for row in run} - {None}
    inside = {row.name for row in run}
    return any(all(row.name in inside for row in rows if row.encoder == encoder) for encoder in encoders)


# Zero


def _zero_problems(rows: list[GradientRow], parameters: Parameters) -> Iterator[str]:
    """Where gradients arrive but are nothing."""
    rows = [row for row in rows if row.trainable]
    if _are_all_zero(rows):
        yield (
            "Every gradient is zero: the loss does not depend on what the model computes. Every label is -100, the "
            f"loss is multiplied by zero, or an activation is dead.{_underflow(rows, parameters)}"
        )
        return
    for is_zero, run in _runs(rows, lambda row: row.state == "zero"):
        if not is_zero:
            continue
        why = "what comes of it is multiplied by zero, masked or lost in a dead activation on its way to the loss"
        if _holds_encoder(rows, run):
            why = (
                "the loss does not depend on the images. There are none in the batch, the attention mask hides "
                "their tokens, or all labels stand in front of them"
            )
        yield f"The gradient of {_groups(run)} is zero: {why}.{_underflow(run, parameters)}"


def _underflow(rows: list[GradientRow], parameters: Parameters) -> str:
    return _half_precision_advice([name for row in rows for name in row.zero], parameters, fault="underflow to zero")


def _half_precision_advice(names: list[str], parameters: Parameters, *, fault: str) -> str:
    if any(parameters[name].dtype == torch.float16 for name in names):
        return f" Gradients in float16 {fault} easily: use bfloat16, or float32 weights with a `GradScaler`."
    return ""


# NaN and infinity


def _non_finite_problems(rows: list[GradientRow], parameters: Parameters) -> Iterator[str]:
    """Where NaN and infinity are, and where they came in."""
    broken = [row for row in rows if row.non_finite]
    if not broken:
        return
    names = [name for row in broken for name in row.non_finite]
    if len(broken) == 1:
        where = f"The gradient of `{broken[0].name}` holds NaN or infinity: {_names(names)}."
    else:
        where = (
            f"The gradients of {len(broken)} of {sum(row.trainable > 0 for row in rows)} groups hold NaN or infinity. "
            f"The backward pass comes from the loss and meets them first in `{broken[-1].name}`: look there and "
            f"behind it. In the order of the data the first is `{broken[0].name}`."
        )
    yield where + _half_precision_advice(names, parameters, fault="overflow to infinity")
    if weights := [name for name in names if not local_part(parameters[name].detach()).isfinite().all()]:
        yield f"{_names(weights)}: NaN or infinity is in the weights themselves; go back to an earlier checkpoint."


# Earlier steps


def _stale_problems(parameters: Parameters, stale: frozenset[int]) -> Iterator[str]:
    """Gradients of an earlier step, which an optimizer would take for this one's."""
    kept = [name for name, parameter in parameters.items() if id(parameter) in stale]
    # Zeros are what `zero_grad(set_to_none=False)` leaves.
    gradients = {name: parameters[name].grad for name in kept}
    if kept := [name for name, grad in gradients.items() if grad is not None and gradient_norm(grad) != 0]:
        yield (
            f"{_names(kept)}: the gradient there is of an earlier step, and this loss added nothing to it. Call "
            "`zero_grad()` between steps."
        )
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if kept := [name for name in frozen if parameters[name].grad is not None]:
        yield (
            f"{_names(kept)}: frozen, but with the gradient of an earlier step, which an optimizer that was given "
            "them goes on to apply. Call `zero_grad()` after freezing."
        )


# Notes


def _frozen_notes(rows: list[GradientRow]) -> Iterator[str]:
    """What is frozen, which is no problem where something else is trained."""
    if not any(row.trainable for row in rows):
        return
    encoders = {row.encoder: None for row in rows if row.encoder is not None}
    whole = [name for name in encoders if not any(row.trainable for row in rows if row.encoder == name)]
    for encoder in whole:
        yield f"The encoder `{encoder}` is frozen. What reads its tokens trains without a gradient through it."
    others = [row for row in rows if row.encoder not in whole]
    if frozen := [_groups(run) for is_frozen, run in _runs(others, lambda row: row.state == "frozen") if is_frozen]:
        yield f"Frozen: {', '.join(frozen)}."


def _zero_notes(rows: list[GradientRow]) -> Iterator[str]:
    """Single gradients that are zero in groups where others are not."""
    if names := [name for row in rows if row.state != "zero" for name in row.zero]:
        adapters = any("lora_A" in name for name in names)
        why = " The gradient of LoRA's A is zero as long as its B is, so at the first step." if adapters else ""
        yield f"Zero, while others of their groups are not: {_names(names)}.{why}"


# Words


def _runs(rows: list[GradientRow], key: Callable[[GradientRow], bool]) -> Iterator[tuple[bool, list[GradientRow]]]:
    """Rows next to one another of which the same holds."""
    for value, run in groupby(rows, key=key):
        yield value, list(run)


def _groups(rows: list[GradientRow]) -> str:
    """Rows next to one another, in words."""
    if len(rows) > 2:
        return f"`{rows[0].name}` to `{rows[-1].name}` ({len(rows)} groups)"
    return " and ".join(f"`{row.name}`" for row in rows)


def _names(names: Iterable[str]) -> str:
    """Parameters in words: the first few by name."""
    return list_some([f"`{name}`" for name in names], most=NUM_NAMES)
