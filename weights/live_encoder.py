"""Weights in: a model around the weights of a live encoder of the package `deepseek-ocr-encoder`."""

from typing import Any

import torch
from torch import nn

from .names import match_tensors, our_name
from .sizes import Model, config_of_shapes, expected_shapes


CARRIED = ("sam", "clip_pre", "clip_tr", "clip_pos_table")
"""What every version of that package's encoder carries: both stages, and in place of CLIP's embeddings a table."""


def load_live_encoder(model_class: type[Model], encoder: Any, *, copy: bool) -> Model:
    """What `DeepSeekOCRVisionModel.from_encoder` says, of a class."""
    tensors = tensors_of(encoder)
    _require_usable(tensors, copy=copy)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # Of a projection that is split any third will do, as only others tell a size.
    ours = {our_name(name).key: shape for name, shape in shapes.items()}
    config = config_of_shapes(ours, num_clip_heads=_num_heads(encoder.clip_tr))
    sources = match_tensors(shapes, expected_shapes(model_class, config))
    with torch.device("meta"):
        model = model_class(config)
    weights = {key: _weight([tensors[name] for name in names], copy=copy) for key, names in sources.items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_().eval()


def tensors_of(encoder: Any) -> dict[str, torch.Tensor]:
    """The encoder's tensors under a checkpoint's names, its own objects and no copies."""
    lacking = [name for name in CARRIED if not hasattr(encoder, name)]
    if lacking:
        raise TypeError(
            f"`encoder` has to be a `deepseek_ocr_encoder.DeepSeekOCREncoder`; a {type(encoder).__name__} without "
            f"{', '.join(lacking)} was given."
        )
    tensors = _below("sam_model.", encoder.sam, beginning_with="pos_embed")
    tensors |= _below("vision_model.pre_layrnorm.", encoder.clip_pre, beginning_with="weight")
    tensors |= _below("vision_model.transformer.", encoder.clip_tr, beginning_with="layers.0.")
    return tensors | {"vision_model.embeddings.position_embedding.weight": encoder.clip_pos_table}


def _below(prefix: str, module: nn.Module, *, beginning_with: str) -> dict[str, torch.Tensor]:
    """A module's parameters under a prefix. What wraps it has put names of its own in front, which are taken off."""
    parameters = dict(module.named_parameters())
    wrapping = next((name[: name.index(beginning_with)] for name in parameters if beginning_with in name), "")
    return {prefix + name.removeprefix(wrapping): parameter for name, parameter in parameters.items()}


def _num_heads(transformer: nn.Module) -> int | None:
    """Heads of the first CLIP layer, by whichever name its class has for them."""
    attention = next((module for name, module in transformer.named_modules() if name.endswith("0.self_attn")), None)
    for owner in (attention, getattr(attention, "config", None)):
        for name in ("num_heads", "num_attention_heads"):
            if hasattr(owner, name):
                return getattr(owner, name)
    return None


def _require_usable(tensors: dict[str, torch.Tensor], *, copy: bool) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"The encoder's {name} is on the meta device, without values; load all of the encoder.")
        if tensor.is_inference() and not copy:
            raise ValueError(
                f"The encoder's {name} was made under `torch.inference_mode()`, so it cannot be trained; pass "
                "`copy=True`."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"The encoder's {name} holds NaN or infinity.")


def _weight(parts: list[torch.Tensor], *, copy: bool) -> nn.Parameter:
    """A weight of the model: the encoder's own parameter, or a copy."""
    if len(parts) == 1:
        (tensor,) = parts
        if copy:
            return nn.Parameter(tensor.detach().clone())
        return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
    fused = torch.cat([part.detach() for part in parts])
    if not copy:
        # Query, key and value of an encoder that has them apart become views of the one projection that we have.
        for part, rows in zip(parts, fused.chunk(len(parts)), strict=True):
            part.data = rows
    return nn.Parameter(fused)
