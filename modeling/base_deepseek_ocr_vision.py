"""What the whole encoder and its two stages share: how transformers treats them, how new weights are drawn, position
tables, and the MLP of a layer.
"""

from contextlib import AbstractContextManager
from typing import ClassVar, Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_deepseek_ocr_vision import at_least_float32


PIECE_TOKENS = 2048
"""Tokens whose hidden layer an MLP computes at once where nothing is kept for backward. On two cores, four pages of
1024 take 0.51 s a block of SAM in float32 and 0.09 s in bfloat16 so, and all at once 0.58 s and 0.16 s. On a GPU, from
how many tokens on an activation is computed again; that has not been measured."""


class DeepSeekOCRVisionPreTrainedModel(PreTrainedModel):
    """Base of the encoder and of its stages."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # `forward` takes any keyword, which `Trainer` would take for a loss of the model's own.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["SamBlock", "ClipLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # SAM adds a bias to its logits, which neither of the two takes.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw every weight from a normal distribution, set biases to 0 and layer norms to the identity."""
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=self.initializer_range)

    @property
    def initializer_range(self) -> float:
        """Standard deviation of newly drawn weights."""
        return self.config.initializer_range


class LayerGroups:
    """Freezing by name, for a model that gives its parameters in groups by `layer_groups`."""

    def layer_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters in groups, in the order of the data."""
        raise NotImplementedError

    def freeze(self, *names: str) -> Self:
        """Stop training layer groups, or everything if none is named. Gradients still pass through them.

        Args:
            names: Groups of `layer_groups`, or the front part of their names: `"sam"`, `"sam.blocks"`, `"clip"`.

        Returns:
            The model itself.

        Raises:
            ValueError: No group goes by that name; nothing is changed then.
        """
        return self._set_requires_grad(names, False)

    def unfreeze(self, *names: str) -> Self:
        """Train layer groups, or everything if none is named; the reverse of `freeze`."""
        return self._set_requires_grad(names, True)

    def _set_requires_grad(self, names: tuple[str, ...], requires_grad: bool) -> Self:
        groups = self.layer_groups()
        chosen = set()
        for name in names or groups:
            matches = {group for group in groups if f"{group}.".startswith(f"{name}.")}
            if not matches:
                raise ValueError(f"{name!r} is no layer group; there are {_group_names(groups)}.")
            chosen |= matches
        for group in chosen:
            for parameter in groups[group]:
                parameter.requires_grad_(requires_grad)
        return self


def _group_names(groups: dict[str, list[nn.Parameter]]) -> str:
    """The names a caller may use, parents first, without the 24th of a kind."""
    parents = [".".join(group.split(".")[:depth]) for group in groups for depth in (1, 2)]
    return ", ".join(dict.fromkeys(parents)) + "; blocks and layers also one by one, such as sam.blocks.0"


def keep_rng_state() -> AbstractContextManager:
    """Leave the random state alone while modules are built, so that `_init_weights` alone decides what a seed gives.

    PyTorch's modules draw weights of their own when they are built, but not on the meta device, where transformers
    builds a model that it loads: one seed would give two models.
    """
    return torch.random.fork_rng(devices=[])


def resize_positions(
    positions: torch.Tensor,  # [H, W, C]
    grid: tuple[int, int],
    *,
    antialias: bool,
) -> torch.Tensor:
    """Resize a position table [H, W, C] to another grid, bicubic, in float32; the table itself if it fits already."""
    if positions.shape[:2] == grid:
        return positions
    channels_first = positions.permute(2, 0, 1)[None].to(at_least_float32(positions.dtype))  # [1, C, H, W]
    resized = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized[0].permute(1, 2, 0).to(positions.dtype)


def feed_forward(
    hidden_states: torch.Tensor,  # [..., C]
    expand: nn.Module,  # C to several times as many channels
    activation: nn.Module,
    contract: nn.Module,  # and back to C
) -> torch.Tensor:  # [..., C]
    """The MLP of a layer, without more of its wide hidden layer in memory than need be.

    For the backward pass only what goes into the activation is kept; what comes out, which the second linear layer
    needs as well, costs next to nothing to compute again. Where nothing is kept, on a CPU, as many tokens are computed
    at a time as fit its cache.
    """

    def activate_and_contract(hidden_layer: torch.Tensor) -> torch.Tensor:
        return contract(activation(hidden_layer))

    # A compiler decides for itself what to keep and how much to compute at a time.
    if not torch.compiler.is_compiling():
        on_cpu = hidden_states.device.type == "cpu"
        if needs_gradient(hidden_states, expand, activation, contract):
            # To compute again takes 0.4 ms of Python, for which a GPU that has little to do would wait.
            pays = on_cpu or hidden_states.shape[:-1].numel() >= PIECE_TOKENS
            if pays and _can_compute_again(hidden_states.device):
                return checkpoint(activate_and_contract, expand(hidden_states), use_reentrant=False)
        elif on_cpu:
            tokens = hidden_states.flatten(0, -2)  # [N, C]
            output = torch.empty_like(tokens)
            for piece, target in zip(tokens.split(PIECE_TOKENS), output.split(PIECE_TOKENS), strict=True):
                target.copy_(activate_and_contract(expand(piece)))
            return output.view(hidden_states.shape)
    return activate_and_contract(expand(hidden_states))


def needs_gradient(hidden_states: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether a gradient will go to modules, or through them to their input."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *parameters))


def _can_compute_again(device: torch.device) -> bool:
    """Whether `torch.utils.checkpoint` works here: not where a CUDA graph is recorded, while which the random state
    cannot be read, nor under `torch.func.grad`, which knows nothing of its hooks.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    try:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return True
    except RuntimeError:
        return False


def checkpointable(layer: GradientCheckpointingLayer, hidden_states: torch.Tensor) -> torch.Tensor:
    """Make sure that reentrant gradient checkpointing sees an input that requires a gradient.

    It gives a layer's weights no gradient otherwise, which happens to the first trainable layer above frozen ones.
    """
    if layer.gradient_checkpointing and layer.training and needs_gradient(hidden_states, layer):
        hidden_states.requires_grad_()
    return hidden_states
