"""How many floating-point operations the encoder takes, from its configuration alone.

A multiplication and the addition to its sum are two operations. Counted are the linear layers, the convolutions, the
products of queries with keys and of weights with values, and SAM's relative positions; norms, activations and softmax
are below a hundredth of it. The released encoder takes 1,139 GFLOP for a page of 1024 x 1024 pixels.
"""

from dataclasses import dataclass

from deepseek_ocr_vision import DeepSeekOCRVisionConfig


PARTS = ("patch embedding", "windowed blocks", "global blocks", "neck", "compressor", "CLIP")
CHECKPOINTED = ("windowed blocks", "global blocks", "CLIP")


@dataclass(frozen=True)
class Operations:
    """Operations of a forward pass, by what a backward pass makes of them.

    Attributes:
        weights: In products with weights: linear layers and convolutions.
        attention: In products of activations with each other, and with the small relative-position tables.
    """

    weights: int = 0
    attention: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.weights + other.weights, self.attention + other.attention)

    def __mul__(self, count: int) -> "Operations":
        return Operations(self.weights * count, self.attention * count)

    @property
    def total(self) -> int:
        return self.weights + self.attention


def forward_operations(config: DeepSeekOCRVisionConfig, size: int, *, padding: bool = True) -> dict[str, Operations]:
    """Operations of a forward pass over one square page, by part (`PARTS`), in the order of the data.

    Args:
        config: The encoder. The projector of `"projected"` mode is not counted.
        size: Side of the page in pixels.
        padding: Whether the tokens that pad a grid to whole windows are counted as all others, as the released code
            computes them. Without, only what the output depends on: the padding's keys and values are the qkv bias.
    """
    sam, clip = config.sam_config, config.clip_config
    grid = size // sam.patch_size
    num_patches, width = grid**2, sam.output_channels
    middle_width, out_width = sam.downsample_channels
    patch_embedding = 2 * num_patches * config.num_channels * sam.patch_size**2 * sam.hidden_size
    neck = 2 * num_patches * (sam.hidden_size * width + 9 * width**2)
    compressor = 2 * 9 * (num_patches // 4 * width * middle_width + num_patches // 16 * middle_width * out_width)
    num_global = len(set(sam.global_attn_indexes))
    num_tokens = num_patches // 16 + (config.feature_mode != "residual")
    clip_layer = _layer(num_tokens, num_tokens, num_tokens, clip.hidden_size, clip.intermediate_size)
    return {
        "patch embedding": Operations(patch_embedding),
        "windowed blocks": _windowed_block(config, grid, padding=padding) * (sam.num_hidden_layers - num_global),
        "global blocks": _sam_block(config, num_patches, num_patches, side=grid) * num_global,
        "neck": Operations(neck),
        "compressor": Operations(compressor),
        "CLIP": clip_layer * clip.num_hidden_layers,
    }


def _windowed_block(config: DeepSeekOCRVisionConfig, grid: int, *, padding: bool) -> Operations:
    window_size = config.sam_config.window_size
    num_padded = (-(-grid // window_size) * window_size) ** 2 if padding else grid**2
    return _sam_block(config, grid**2, num_padded, side=window_size)


def _sam_block(config: DeepSeekOCRVisionConfig, num_patches: int, num_attending: int, *, side: int) -> Operations:
    """A block whose attention, its projections included, is over `num_attending` tokens in squares of `side`."""
    sam = config.sam_config
    relative_positions = 2 * num_attending * 2 * side * sam.hidden_size
    layer = _layer(num_patches, num_attending, side**2, sam.hidden_size, sam.mlp_dim)
    return layer + Operations(attention=relative_positions)


def _layer(num_tokens: int, num_attending: int, num_keys: int, width: int, mlp_width: int) -> Operations:
    """A transformer layer: four projections in the attention, two products a head, and the MLP."""
    weights = 2 * num_attending * 4 * width**2 + 2 * num_tokens * 2 * width * mlp_width
    return Operations(weights, 2 * 2 * num_attending * num_keys * width)


def step_operations(
    config: DeepSeekOCRVisionConfig, size: int, *, training: str = "nothing", checkpointing: bool = False
) -> int:
    """Operations of a step over one page, the backward pass counted as twice the forward pass of what it goes through.

    Once where weights get no gradient: then only the inputs' is computed. Checkpointing computes the blocks and layers
    that the backward pass goes through once more.

    Args:
        config: The encoder.
        size: Side of the page in pixels.
        training: `"nothing"`, `"frozen"`, `"clip"`, `"lora"` or `"full"`, as in `Job`.
        checkpointing: Whether gradient checkpointing is on.
    """
    parts = forward_operations(config, size)
    forward = sum(part.total for part in parts.values())
    if training in ("nothing", "frozen"):
        return forward
    reached = ("CLIP",) if training == "clip" else PARTS
    for_weights = 1 if training == "lora" else 2
    backward = sum(for_weights * parts[name].weights + 2 * parts[name].attention for name in reached)
    repeated = sum(parts[name].total for name in reached if name in CHECKPOINTED) if checkpointing else 0
    return forward + backward + repeated
