"""Learning-rate decay layer by layer: what lies nearer to the pixels is changed less.

As in fine-tuning BEiT (arXiv 2106.08254, section 3.2) and MAE (arXiv 2111.06377, appendix A.1), and in timm's
`param_groups_layer_decay`, here over the encoder's own `layer_groups`, the list that freezing uses.
"""

from typing import Any

from torch import nn

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import require_number
from deepseek_ocr_vision.training.gradient_rows import is_encoder


# As timm's and BEiT's `no_weight_decay`: weight decay would pull tables of positions to zero. BEiT counts those of
# relative positions, too.
_POSITION_TABLES = {"pos_embed", "rel_pos_h", "rel_pos_w", "position_embedding"}


def layer_decay_groups(
    model: nn.Module, *, learning_rate: float, layer_decay: float, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for an optimizer, those of the encoder with smaller rates towards the pixels.

    The last of an encoder's n layer groups gets `learning_rate * layer_decay`, the first one
    `learning_rate * layer_decay ** n`; everything outside of encoders gets `learning_rate` itself. The released
    encoder has 40 groups: 0.9 leaves 1.5 % of the rate for the first of them, 0.75, usual for 12 layers, 0.001 %.

    Every trainable parameter is in one group exactly. Those that are frozen when this is called are in none: build the
    optimizer anew after `unfreeze`.

    Args:
        model: An encoder, or any module that contains one or several, wrapped by peft or not.
        learning_rate: Of what is outside of encoders, above 0.
        layer_decay: Factor from each layer group to the one before it, above 0 and at most 1.
        weight_decay: Of matrices and convolutions, at least 0. Biases, norms, single vectors such as the class token,
            and tables of positions get none, as in BEiT and timm.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and `name`, which any optimizer of PyTorch takes. The name is
        the layer group, with the encoder's place in the model in front; of what is outside, `other`.

    Raises:
        TypeError: `model` is no module, or an argument no number.
        ValueError: An argument is out of its range, or there is no encoder in `model`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` has to be a torch.nn.Module, got a {type(model).__name__}.")
    learning_rate = require_number("learning_rate", learning_rate, above=0)
    layer_decay = require_number("layer_decay", layer_decay, above=0, at_most=1)
    weight_decay = require_number("weight_decay", weight_decay, at_least=0)
    places, tables = _places(model, layer_decay), _position_tables(model)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group, scale = places.get(id(parameter), ("other", 1.0))
            decays = parameter.ndim > 1 and id(parameter) not in tables
            fields = {"name": group, "lr": learning_rate * scale, "weight_decay": weight_decay if decays else 0.0}
            groups.setdefault((group, decays), fields | {"params": []})["params"].append(parameter)
    return list(groups.values())


def _position_tables(model: nn.Module) -> set[int]:
    """The `id` of every parameter that is a table of positions, or that one is computed from, as in a parametrization,
    under any of its names.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter) for name, parameter in named if _POSITION_TABLES.intersection(name.split("."))}


def _places(model: nn.Module, layer_decay: float) -> dict[int, tuple[str, float]]:
    """By a parameter's `id`, its layer group in the first encoder that has it, and the factor of its rate."""
    places: dict[int, tuple[str, float]] = {}
    encoders: list[tuple[str, Any]] = [(place, part) for place, part in model.named_modules() if is_encoder(part)]
    if not encoders:
        raise ValueError(f"`model`, a {type(model).__name__}, contains no DeepSeekOCRVisionModel, whose layers decay.")
    for place, encoder in encoders:
        groups = encoder.layer_groups()
        for depth, (name, parameters) in enumerate(groups.items()):
            group = f"{place}.{name}" if place else name
            for parameter in parameters:
                places.setdefault(id(parameter), (group, layer_decay ** (len(groups) - depth)))
    return places
