"""How many floating-point operations a forward pass takes, from the encoder's configuration alone.

A multiplication and the addition to its sum are two operations. Counted are the linear layers, the convolutions, the
products of queries with keys and of attention weights with values, and SAM's relative positions; norms, activations
and softmax are below a hundredth of the total. The released encoder takes 1,139 GFLOP for a page of 1024 x 1024.
"""

from deepseek_ocr_vision import DeepSeekOCRVisionConfig


def forward_operations(config: DeepSeekOCRVisionConfig, size: int) -> dict[str, int]:
    """Operations of a forward pass over one square page, by part of the encoder, in the order of the data.

    Tokens that pad a grid to whole windows are counted as all others, as the released code computes them.

    Args:
        config: The encoder. The projector of feature mode `"projected"` is not counted.
        size: Side of the page in pixels.
    """
    sam, clip = config.sam_config, config.clip_config
    grid = size // sam.patch_size
    num_patches, width = grid**2, sam.output_channels
    num_padded = (-(-grid // sam.window_size) * sam.window_size) ** 2
    middle_width, out_width = sam.downsample_channels
    num_global = len(set(sam.global_attn_indexes))
    num_windowed = sam.num_hidden_layers - num_global
    num_tokens = num_patches // 16 + (config.feature_mode != "residual")
    clip_layer = _layer(num_tokens, num_tokens, num_tokens, clip.hidden_size, clip.intermediate_size)
    return {
        "patch embedding": 2 * num_patches * config.num_channels * sam.patch_size**2 * sam.hidden_size,
        "windowed blocks": num_windowed * _sam_block(config, num_patches, num_padded, side=sam.window_size),
        "global blocks": num_global * _sam_block(config, num_patches, num_patches, side=grid),
        "neck": 2 * num_patches * (sam.hidden_size * width + 9 * width**2),
        "compressor": 2 * 9 * (num_patches // 4 * width + num_patches // 16 * out_width) * middle_width,
        "CLIP": clip.num_hidden_layers * clip_layer,
    }


def _sam_block(config: DeepSeekOCRVisionConfig, num_patches: int, num_attending: int, *, side: int) -> int:
    """A block whose attention, its projections included, is over `num_attending` tokens in squares of `side`."""
    sam = config.sam_config
    relative_positions = 2 * num_attending * 2 * side * sam.hidden_size
    return _layer(num_patches, num_attending, side**2, sam.hidden_size, sam.mlp_dim) + relative_positions


def _layer(num_tokens: int, num_attending: int, num_keys: int, width: int, mlp_width: int) -> int:
    """A transformer layer: four projections in the attention, two products per head, and the MLP."""
    projections = 2 * num_attending * 4 * width**2
    attention = 2 * num_attending * 2 * num_keys * width
    return projections + attention + 2 * num_tokens * 2 * width * mlp_width
