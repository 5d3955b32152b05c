"""Prepared pictures through an encoder, batch by batch.

Letters in the shapes: B pictures of a batch, N tokens of a picture, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


Inputs = dict[str, Any]
"""What the model reads of one picture, as the image processor gives it for a batch of one."""


def are_alike(first: Inputs, second: Inputs) -> bool:
    """Whether two pictures fit into one batch: pages of one size, and tiles of one size, however many."""
    return first.keys() == second.keys() and all(_shape(first[name]) == _shape(second[name]) for name in first)


def _shape(value: Any) -> Any:
    return value.shape[1:] if isinstance(value, torch.Tensor) else None


def encode_batch(model: PreTrainedModel, inputs: Sequence[Inputs], *, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tokens of pictures that are alike.

    Args:
        model: The encoder. It computes in its own dtype, without autocast.
        inputs: What the model reads of each.
        dtype: Of the result.

    Returns:
        A tensor [N, C] a picture, on the CPU.
    """
    device = model.device
    batch = {name: _joined([each[name] for each in inputs], device) for name in inputs[0]}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        outputs = model(**batch, return_dict=True)
    tokens, mask = outputs.last_hidden_state.to(dtype).cpu(), getattr(outputs, "attention_mask", None)  # [B, N, C]
    if mask is None:
        return list(tokens)
    return [row[is_token] for row, is_token in zip(tokens, mask.cpu(), strict=True)]


def _joined(values: list[Any], device: torch.device) -> Any:
    """A value of each picture as one of the batch: tensors behind each other, lists too."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values).to(device)
    return [entry for value in values for entry in value]
