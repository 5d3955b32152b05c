"""How much memory a step takes, from the configuration alone. `docs/performance.md` explains the terms.

The peak is the weights, plus the larger of what the forward pass and the backward pass hold at their worst moment:
what the parts passed so far keep for the backward pass, the gradients made so far, and what the part at work needs.
"""

from dataclasses import dataclass, replace

import torch

from benchmarks.operations import forward_operations
from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel


STATISTICS = 4  # bytes a value of what norms and softmax keep, whatever the dtype
LORA_RANK = 8


@dataclass(frozen=True)
class Part:
    """What a layer group takes.

    Attributes:
        parameters: Number of parameters.
        trained: Number of those that get a gradient, or of an adapter's in their place.
        kept: Bytes kept for the backward pass.
        working: Bytes that it needs while it is at work, beyond what it keeps.
        repeated: Bytes that the backward pass makes once more of what checkpointing did not keep.
    """

    parameters: int
    trained: int = 0
    kept: int = 0
    working: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes that a step takes, the process around it aside.

    Attributes:
        parameters: The weights, adapters included.
        gradients: All gradients.
        kept: What is kept for the backward pass when it begins.
        peak: The most that there is at any moment, weights included.
    """

    parameters: int
    gradients: int
    kept: int
    peak: int


@dataclass(frozen=True)
class _Case:
    """What decides about the memory of a layer."""

    training: str
    checkpointing: bool
    value_size: int


def step_memory(
    config: DeepSeekOCRVisionConfig,
    size: int,
    *,
    training: str = "nothing",
    checkpointing: bool = False,
    value_size: int = 4,
    batch_size: int = 1,
) -> Memory:
    """Memory of a step over square pages.

    Args:
        config: The encoder.
        size: Side of a page in pixels.
        training: `"nothing"`, `"frozen"`, `"clip"`, `"lora"` or `"full"`, as in `Job`.
        checkpointing: Whether gradient checkpointing is on.
        value_size: Bytes of a weight or an activation: 4, or 2 in half precision.
        batch_size: Pages at once.
    """
    case = _Case(training, checkpointing, value_size)
    parts = [_times(part, batch_size) for part in _parts(config, size, case)]
    weights = value_size * sum(part.parameters + (part.trained if training == "lora" else 0) for part in parts)
    gradients = value_size * sum(part.trained for part in parts)
    worst, kept = 0, 0
    for part in parts:
        kept += part.kept
        worst = max(worst, kept + part.working)
    all_kept, made = kept, 0
    for part in reversed(parts if gradients else []):
        made += value_size * part.trained
        worst = max(worst, kept + made + part.working + part.repeated)
        kept -= part.kept
    return Memory(weights, gradients, all_kept, weights + worst)


def logits_memory(config: DeepSeekOCRVisionConfig, size: int, *, value_size: int = 4) -> int:
    """Bytes of two tensors as large as the logits of every SAM block: what an attention keeps beyond `step_memory` if
    the relative positions are given to it as a mask.
    """
    attention = forward_operations(config, size)
    products = attention["windowed blocks"].attention + attention["global blocks"].attention
    return 2 * value_size * products * config.sam_config.num_attention_heads // (4 * config.sam_config.hidden_size)


def _times(part: Part, batch_size: int) -> Part:
    kept, working, repeated = (batch_size * value for value in (part.kept, part.working, part.repeated))
    return replace(part, kept=kept, working=working, repeated=repeated)


def _parts(config: DeepSeekOCRVisionConfig, size: int, case: _Case) -> list[Part]:
    """The layer groups in the order of the data, for one page."""
    with torch.device("meta"):
        groups = DeepSeekOCRVisionModel(config).layer_groups()
    counts = {name: sum(parameter.numel() for parameter in group) for name, group in groups.items()}
    return [_part(config, size, case, name, count) for name, count in counts.items()]


def _part(config: DeepSeekOCRVisionConfig, size: int, case: _Case, name: str, count: int) -> Part:
    sam, clip = config.sam_config, config.clip_config
    num_patches = (size // sam.patch_size) ** 2
    num_tokens = num_patches // 16 + (config.feature_mode != "residual")
    if name.startswith("sam.blocks."):
        is_first = name == "sam.blocks.0"
        shape = _LayerShape(num_patches, sam.hidden_size, sam.mlp_dim, statistics=4)
        return _layer(case, count, shape, is_trained=_is_trained(case, name), is_first=is_first)
    if name.startswith("clip.layers."):
        # SDPA keeps the logarithm of a sum for each query of each head.
        statistics = 4 + clip.num_attention_heads
        shape = _LayerShape(num_tokens, clip.hidden_size, clip.intermediate_size, statistics=statistics)
        return _layer(case, count, shape, is_trained=_is_trained(case, name), is_first=False)
    width, (middle_width, out_width) = sam.output_channels, sam.downsample_channels
    # What goes into each convolution, norm and linear layer, and what comes out of the last.
    values, out = {
        "sam.patch_embed": (config.num_channels * size**2, num_patches * sam.hidden_size),
        "sam.neck": (num_patches * (sam.hidden_size + 3 * width), num_patches * width),
        "sam.compressor": (num_patches * width + num_patches // 4 * middle_width, num_patches // 16 * out_width),
        "clip.embeddings": (num_tokens * clip.hidden_size, num_tokens * clip.hidden_size),
        "projector": (num_tokens * config.concat_size, num_tokens * config.projection_dim),
    }[name]
    # The gradient of adapters passes through all of these but the first, which has none before it.
    is_reached = _is_trained(case, name) or (case.training == "lora" and name != "sam.patch_embed")
    kept = case.value_size * values if is_reached else 0
    working = case.value_size * (values + out)
    return Part(count, count if _is_trained(case, name) else 0, kept, working - kept)


def _is_trained(case: _Case, name: str) -> bool:
    return case.training == "full" or (case.training == "clip" and name.startswith("clip."))


@dataclass(frozen=True)
class _LayerShape:
    """A transformer layer.

    Attributes:
        num_tokens: That pass through it.
        width: Of a token.
        mlp_width: Hidden width of its MLP.
        statistics: Values in float32 that norms and attention keep for each token.
    """

    num_tokens: int
    width: int
    mlp_width: int
    statistics: int


def _layer(case: _Case, count: int, shape: _LayerShape, *, is_trained: bool, is_first: bool) -> Part:
    """A transformer layer, by the tensors that its backward pass reads."""
    width, mlp_width = shape.width, shape.mlp_width
    working = case.value_size * shape.num_tokens * (2 * mlp_width + 3 * width)
    if not is_trained and case.training != "lora":
        return Part(count, working=working)
    # Of both norms the input, of the qkv projection the input and the output, the attention's output, and what goes
    # into the activation of the MLP.
    values = width + width + width + 3 * width + width + mlp_width
    if is_trained:
        # What the MLP reads; of a frozen one it is not kept.
        values += width
    else:
        values += LORA_RANK - (width if is_first else 0)
    kept = shape.num_tokens * (case.value_size * values + STATISTICS * shape.statistics)
    trained = count if is_trained else LORA_RANK * 4 * width
    if not case.checkpointing:
        return Part(count, trained, kept, working)
    entry = case.value_size * shape.num_tokens * width
    return Part(count, trained, entry, working, repeated=kept - entry)
