"""What the whole encoder and its stages share: how transformers treats them, how new weights are initialised, position
tables, the MLP of a layer, and in which dtype layers compute where a CPU would emulate theirs."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN


PIECE_TOKENS = 2048
"""Tokens whose hidden layer an MLP computes at once where nothing is kept for backward: on two cores 0.51 in place of
0.58 s a block of SAM. On a GPU, from how many on an activation is computed again, which has not been measured."""


# What a processor has to have, by the names of `torch.cpu.get_capabilities()`, to multiply in half precision.
_HALF_PRODUCTS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
_PRODUCTS = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.einsum, torch.Tensor.matmul)
_IN_GRAPHS = torch.__version__ >= "2.14"  # whether graphs take a mode: those of 2.6 do not, others were not tried


class DeepSeekOCRVisionPreTrainedModel(PreTrainedModel):
    """Base of the encoder and of its stages."""

    main_input_name = "pixel_values"
    input_modalities = "image"
    embeddings_path: ClassVar[str]
    # `forward` takes any keyword, which `Trainer` would take for a loss of the model's own.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["SamBlock", "ClipLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    # SAM adds a bias to its logits, which neither of the two takes.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True

    def get_input_embeddings(self) -> nn.Module:
        """What reads the input: of pixels, the convolution that turns them into patches."""
        return self.get_submodule(self.embeddings_path)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace what reads the input."""
        self.set_submodule(self.embeddings_path, value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights from a normal distribution, biases with 0 and layer norms as the identity."""
        # What follows the two stages is initialised as the second.
        config = getattr(self.config, "clip_config", self.config)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                init.zeros_(parameter)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=config.initializer_range)


class LayerGroups:
    """Freezing by name, for a model that gives its parameters in groups by `layer_groups`."""

    def layer_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters in groups, in the order of the data."""
        raise NotImplementedError

    def freeze(self, *names: str) -> Self:
        """Stop training layer groups, or everything if none is named. Gradients still pass through them.

        Args:
            names: Groups of `layer_groups`, or the front part of their names: `"sam"`, `"sam.blocks"`, `"clip"`.

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
                # Parents first, without the 24th of a kind.
                parents = dict.fromkeys(".".join(group.split(".")[:depth]) for group in groups for depth in (1, 2))
                one_by_one = "blocks and layers also one by one, such as sam.blocks.0"
                raise ValueError(f"{name!r} is no layer group; there are {', '.join(parents)}; {one_by_one}.")
            chosen |= matches
        for group in chosen:
            for parameter in groups[group]:
                parameter.requires_grad_(requires_grad)
        return self


def keep_rng_state() -> AbstractContextManager:
    """Leave the random state to `_init_weights`: PyTorch's modules draw from it when they are built, but not on the
    meta device, where transformers builds a model that it loads, and one seed would give two models."""
    return torch.random.fork_rng(devices=[])


def resize_positions(positions: torch.Tensor, grid: tuple[int, int], *, antialias: bool) -> torch.Tensor:
    """Resize a position table [H, W, C] to another grid, bicubic, in float32; the table itself if it fits already."""
    if not is_open(*grid) and positions.shape[:2] == grid:
        return positions
    channels_first = positions.permute(2, 0, 1)[None].to(at_least_float32(positions.dtype))  # [1, C, H, W]
    resized = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return resized[0].permute(1, 2, 0).to(positions.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for steps that lose too much in half precision: float32, or float64 if that is what comes in."""
    return dtype if dtype == torch.float64 else torch.float32


def has_products(dtype: torch.dtype, capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU multiplies in a dtype, by `torch.cpu.get_capabilities()`; where they say nothing, it does."""
    needed = _HALF_PRODUCTS.get(dtype, ())
    return not needed or capabilities.get("architecture") != "x86_64" or any(map(capabilities.get, needed))


_CAPABILITIES = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
EMULATED = [dtype for dtype in _HALF_PRODUCTS if not has_products(dtype, _CAPABILITIES)]  # by this machine's CPU


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch emulates a dtype's products on a device, in 5 to 400 times what they take in float32."""
    return device.type == "cpu" and dtype in EMULATED


class _InFloat32(TorchFunctionMode):
    """Computes products in half precision in float32 and rounds, whatever layer asks; but not of quantised tensors."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        options, given = kwargs or {}, (*args, *(kwargs or {}).values())
        tensors = [each for each in given if isinstance(each, torch.Tensor)] if function in _PRODUCTS else []
        dtype = _cast_dtype(tensors[0]) if tensors else torch.float32
        if dtype not in EMULATED or any(type(each) not in (torch.Tensor, nn.Parameter) for each in tensors):
            return function(*args, **options)
        with torch.autocast("cpu", enabled=False):
            options = {name: _in_float32(each) for name, each in options.items()}
            return function(*map(_in_float32, args), **options).to(dtype)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _cast_dtype(tensor: torch.Tensor) -> torch.dtype:
    is_cast = torch.is_autocast_enabled("cpu") and tensor.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype("cpu") if is_cast else tensor.dtype


def never_emulated(hidden_states: torch.Tensor) -> AbstractContextManager:
    """A context for layers that read a tensor, in which nothing is emulated. Files for other machines have none."""
    seen = not is_recording() or (_IN_GRAPHS and torch.compiler.is_dynamo_compiling())
    return _InFloat32() if seen and is_emulated(_cast_dtype(hidden_states), hidden_states.device) else nullcontext()


def is_recording() -> bool:
    """Whether the operations go into a graph: by `torch.compile`, `torch.export`, or by tracing, for ONNX too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_open(*sizes: int | torch.SymInt) -> bool:
    """Whether a graph leaves sizes open, which comparisons would fix. A compiled one does where nothing is trained."""
    of_dynamo = torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()
    return of_dynamo or any(isinstance(size, torch.SymInt) for size in sizes)


class FeedForward(nn.Module):
    """The feed-forward half of a layer, whose two linear layers have the names of the released checkpoint."""

    def __init__(self, width: int, hidden_width: int, *, activation: str, names: tuple[str, str]):
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Linear(width, hidden_width))
        self.act = ACT2FN[activation]
        self.add_module(names[1], nn.Linear(hidden_width, width))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [..., C] -> [..., C]
        return feed_forward(hidden_states, getattr(self, self.names[0]), self.act, getattr(self, self.names[1]))


def feed_forward(
    hidden_states: torch.Tensor,  # [..., C]
    expand: nn.Module,  # C to several times as many channels
    activation: nn.Module,
    contract: nn.Module,  # and back to C
) -> torch.Tensor:  # [..., C]
    """The MLP of a layer, with as little of its wide hidden layer in memory as possible.

    For the backward pass only the input of the activation is kept; its output is computed again, which costs next to
    nothing. Where nothing is kept, a CPU computes as many tokens at a time as fit its cache.
    """

    def activate_and_contract(hidden_layer: torch.Tensor) -> torch.Tensor:
        with never_emulated(hidden_layer):  # once more, as it may be called again from the backward pass
            return contract(activation(hidden_layer))

    # A compiler decides for itself what to keep and how much to compute at a time.
    if not is_recording():
        on_cpu, num_tokens = hidden_states.device.type == "cpu", hidden_states.shape[:-1].numel()
        if needs_gradient(hidden_states, expand, activation, contract):
            hidden_layer = expand(hidden_states)
            # To compute again takes 0.4 ms of Python, for which a GPU that has little to do would wait.
            if (on_cpu or num_tokens >= PIECE_TOKENS) and _can_compute_again(hidden_layer):
                return checkpoint(activate_and_contract, hidden_layer, use_reentrant=False)
            return activate_and_contract(hidden_layer)
        if on_cpu and num_tokens > PIECE_TOKENS:
            pieces = hidden_states.flatten(0, -2).split(PIECE_TOKENS)  # [n, C] each
            return torch.cat([activate_and_contract(expand(piece)) for piece in pieces]).view(hidden_states.shape)
    return activate_and_contract(expand(hidden_states))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong: with its weights. If those are offloaded, hooks move the inputs."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def needs_gradient(hidden_states: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether a gradient will go to modules, or through them to their input."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, *parameters))


def _can_compute_again(hidden_layer: torch.Tensor) -> bool:
    """Whether `torch.utils.checkpoint` works: not while a CUDA graph is recorded, nor in `torch.func`'s transforms."""
    if hidden_layer.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    try:
        hidden_layer.data_ptr()
    except RuntimeError:
        return False
    return True


def checkpointable(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Make sure that reentrant gradient checkpointing sees an input that requires a gradient.

    It gives a layer's weights no gradient otherwise, which happens to the first trainable layer above frozen ones.
    """
    if layer.gradient_checkpointing and layer.training and needs_gradient(hidden_states, layer):
        hidden_states.requires_grad_()
    return hidden_states
