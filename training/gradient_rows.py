"""Layer groups of any model, in the order of the data, and what a backward pass left in each."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import nn


State = Literal["with gradient", "zero", "missing", "non-finite", "frozen"]

WRAPPERS = ("module", "_orig_mod", "base_model", "model")
"""What DistributedDataParallel, torch.compile and peft call the one module that they wrap."""


@dataclass(frozen=True)
class GradientRow:
    """The gradients of one layer group. Each parameter, a tensor whatever its size, is named in one of five lists.

    Attributes:
        name: The group, with the place of what it belongs to in front: `model.vision_tower.sam.blocks.0`.
        encoder: The place of the encoder that it belongs to, `""` for a model that is one, `None` outside of any.
        with_gradient: Trainable parameters with a gradient that is finite and not zero.
        zero: Trainable parameters whose gradient is zero throughout.
        missing: Trainable parameters without a gradient, or with one of an earlier step only.
        non_finite: Trainable parameters whose gradient holds NaN or infinity.
        frozen: Parameters that are not trained.
        norm: Euclidean norm of all gradients of the group, at least 0; NaN or infinity if one holds such.
    """

    name: str
    encoder: str | None
    with_gradient: tuple[str, ...]
    zero: tuple[str, ...]
    missing: tuple[str, ...]
    non_finite: tuple[str, ...]
    frozen: tuple[str, ...]
    norm: float

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(map(len, (self.with_gradient, self.zero, self.missing, self.non_finite)))

    @property
    def state(self) -> State:
        """The group in a word: the worst of its parameters, but `zero` only if no gradient is anything else."""
        if not self.trainable:
            return "frozen"
        if self.non_finite:
            return "non-finite"
        if self.missing:
            return "missing"
        return "with gradient" if self.with_gradient else "zero"

    @property
    def is_unreached(self) -> bool:
        """Whether none of its trainable parameters, of which there are some, has a gradient."""
        return 0 < self.trainable == len(self.missing)


class LayerGroup(NamedTuple):
    """Parameters that make one row, by name, and the place of the encoder that they belong to, if any."""

    name: str
    encoder: str | None
    parameters: dict[str, nn.Parameter]


# Groups


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """All parameters in groups, each in the first that has it; encoders first, as images come first."""
    model = _unwrapped(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for name, encoder, parameters in sorted(_divided(model), key=lambda part: part[1] is None):
        own = {names.pop(id(parameter)): parameter for parameter in parameters if id(parameter) in names}
        if own:
            groups.append(LayerGroup(name, encoder, own))
    return groups


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module within those that only wrap it."""
    while not is_encoder(model):
        children = dict(model.named_children())
        if len(children) != 1 or not set(children) <= set(WRAPPERS) or dict(model.named_parameters(recurse=False)):
            break
        (model,) = children.values()
    return model


def is_encoder(module: nn.Module) -> bool:
    """Whether a module is one of our encoders, by what it can do: code from a checkpoint has classes of its own.

    Its class is asked, since peft's wrappers answer for the module that they wrap.
    """
    return callable(getattr(type(module), "layer_groups", None))


def _divided(
    module: nn.Module, name: str = "", parent: nn.Module | None = None
) -> Iterator[tuple[str, str | None, Iterable[nn.Parameter]]]:
    """The parts of a module: name, place of the encoder if it is in one, parameters."""
    if is_encoder(module):
        groups: dict[str, Iterable[nn.Parameter]] = cast(Any, module).layer_groups()
        for group, parameters in (groups | {"other": module.parameters()}).items():
            yield _joined(name, group), name, parameters
    elif _has_parts(module, parent):
        for own_name, parameter in module.named_parameters(recurse=False):
            yield _joined(name, own_name), None, [parameter]
        for child_name, child in module.named_children():
            yield from _divided(child, _joined(name, child_name), module)
    else:
        yield name, None, module.parameters()


def _has_parts(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether a module's children are groups of their own: in the model itself, in what holds an encoder, and in what
    holds a list of layers, unless it is an item of such a list.
    """
    is_layer = isinstance(parent, nn.ModuleList)
    return parent is None or any(
        is_encoder(part) or (isinstance(part, nn.ModuleList) and not is_layer) for part in module.modules()
    )


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


# Rows


def gradient_row(group: LayerGroup, stale: frozenset[int]) -> GradientRow:
    """Look at the gradients of a group, one at a time; `stale` are parameters whose gradient is of an earlier step."""
    names: dict[State, list[str]] = {state: [] for state in get_args(State)}
    norms = []
    for name, parameter in group.parameters.items():
        state, norm = _state(parameter, is_stale=id(parameter) in stale)
        names[state].append(name)
        norms.append(norm)
    lists = {state.replace(" ", "_").replace("-", "_"): tuple(found) for state, found in names.items()}
    together = math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)  # where infinity would win over NaN
    return GradientRow(group.name, group.encoder, **lists, norm=together)


def _state(parameter: nn.Parameter, *, is_stale: bool) -> tuple[State, float]:
    """The state of a parameter's gradient, and its norm, 0 without one."""
    gradient = parameter.grad
    if not parameter.requires_grad:
        return "frozen", 0.0
    if gradient is None or gradient.is_meta or is_stale:
        return "missing", 0.0
    norm = gradient_norm(gradient)
    if not math.isfinite(norm):
        return "non-finite", norm
    return ("with gradient" if norm else "zero"), norm


@torch.no_grad()
def gradient_norm(gradient: torch.Tensor) -> float:
    """The Euclidean norm of a gradient; 0 only if all of it is, NaN or infinity only if something in it is."""
    if is_distributed(gradient):
        return _norm_over_processes(gradient)
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    if values.numel() == 0:
        return 0.0
    precision = torch.promote_types(values.dtype, torch.float32)
    largest = torch.linalg.vector_norm(values, ord=math.inf, dtype=precision).item()
    if largest == 0 or not math.isfinite(largest):
        return largest
    norm = torch.linalg.vector_norm(values, dtype=precision).item()
    if 1e-15 < norm < 1e15:
        return norm
    # Squares leave the range of float32 long before the values do.
    return largest * torch.linalg.vector_norm(values.to(precision) / largest).item()


def _norm_over_processes(gradient: Any) -> float:
    """The norm of a `DTensor`: of the pieces that the processes hold, or of the whole where it is not in pieces."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not all(placement.is_shard() or placement.is_replicate() for placement in gradient.placements):
        return gradient_norm(gradient.full_tensor())
    piece = gradient.to_local()
    norm = gradient_norm(piece)
    squared = torch.tensor(norm * norm, dtype=torch.float64, device=piece.device)
    placements = [Partial() if placement.is_shard() else Replicate() for placement in gradient.placements]
    return math.sqrt(DTensor.from_local(squared, gradient.device_mesh, placements, run_check=False).full_tensor())


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a `DTensor`, a class that not every build of PyTorch has."""
    return hasattr(tensor, "to_local")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; all of it where it is not distributed."""
    return cast(Any, tensor).to_local() if is_distributed(tensor) else tensor
