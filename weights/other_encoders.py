"""Where encoders start: from SAM and CLIP, as the paper's did, or from GOT-OCR2's encoder and CLIP.

DeepSeek-OCR's encoder (arXiv 2510.18234, section 3.2) was put together from a pretrained SAM ViT-B and a pretrained
CLIP-L, with new convolutions between them. GOT-OCR2 (arXiv 2409.01704) has a trained SAM with two such convolutions.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepseek_ocr_vision.configuration.configuration_deepseek_ocr_vision import FeatureMode
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import resize_positions
from deepseek_ocr_vision.modeling.loading_deepseek_ocr_vision import problems_with

from .checkpoints import open_local
from .names import our_name
from .repository import local_checkpoint
from .safetensors_files import is_finite
from .sizes import config_of_shapes


Source = str | os.PathLike | Mapping[str, torch.Tensor]

POSITIONS = "vision_model.embeddings.position_embedding.weight"
COMPRESSOR = ("sam_model.net_2.weight", "sam_model.net_3.weight")
COMPRESSOR_WIDTH = 512
"""Channels between the compressor's two convolutions, in the release and in GOT-OCR2."""

# Names in checkpoints of transformers' SAM, of segment-anything, of GOT-OCR2, and of transformers' GOT-OCR2.
_SAM_NAMES = (
    (r"^(?:vision_encoder|image_encoder|(?:model\.)?vision_tower_high|(?:model\.)?vision_tower)\.", "sam_model."),
    (r"^(?:model\.)?multi_modal_projector\.conv_upsampler1\.", "sam_model.net_2."),
    (r"^(?:model\.)?multi_modal_projector\.conv_upsampler2\.", "sam_model.net_3."),
    (r"^(?=patch_embed\.|pos_embed$|blocks\.|neck\.|net_[23]\.)", "sam_model."),
)
# Of transformers' CLIP, and of OpenAI's.
_CLIP_NAMES = (
    (r"^(?=embeddings\.|pre_layrnorm\.|encoder\.)", "vision_model."),
    (r"^vision_model\.encoder\.", "vision_model.transformer."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.transformer.layers."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", POSITIONS),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.qkv_proj.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def from_sam_and_clip(
    sam: Source, clip: Source, *, feature_mode: FeatureMode = "residual", dtype: torch.dtype = torch.float32
) -> DeepSeekOCRVisionModel:
    """Make an encoder as the paper's began: SAM's image encoder, new convolutions, and CLIP's image encoder.

    Taken are SAM's patch embedding, position table, blocks and neck, and CLIP's class token (where the feature mode
    has one), position table, first norm and layers. Newly initialised are the two convolutions of the compressor,
    unless the SAM checkpoint has them, and what the feature mode adds behind CLIP. CLIP's position table is resized,
    bicubic and with antialiasing, to the grid of SAM's page, 16 x 16 for 1024 pixels; that of CLIP-L at 224 pixels
    fits.

    Args:
        sam: A SAM ViT: a Hub id such as `"facebook/sam-vit-base"`, a folder, a safetensors file, a state dict saved by
            PyTorch (`.pth`, read with `weights_only=True`), or the state dict itself; in the layout of transformers or
            of segment-anything.
        clip: A CLIP with a vision transformer, in the same forms; in the layout of transformers, such as
            `"openai/clip-vit-large-patch14"`, or of OpenAI.
        feature_mode: What the encoder's tokens are.
        dtype: What to convert the weights to.

    Returns:
        The model in `eval()`. Every parameter requires a gradient.

    Raises:
        TypeError: Either is none of these.
        ValueError: A weight is missing, not finite or of another shape than the others imply; the message names it.
        OSError: Either is not there or cannot be fetched.
    """
    tensors, _ = _tensors(sam, "sam", _SAM_NAMES, "sam_model.")
    of_clip, config = _tensors(clip, "clip", _CLIP_NAMES, "vision_model.")
    return _joined(tensors, of_clip, config, feature_mode, dtype)


def from_got_ocr2(
    got_ocr2: Source, clip: Source, *, feature_mode: FeatureMode = "residual", dtype: torch.dtype = torch.float32
) -> DeepSeekOCRVisionModel:
    """Make an encoder of GOT-OCR2's, as stage one with its two convolutions, and of CLIP's image encoder.

    As `from_sam_and_clip`, of the same arguments and errors, but that the compressor has to be there as well.

    Args:
        got_ocr2: A GOT-OCR2, in its own layout or that of transformers.
        clip: As there.
        feature_mode: As there.
        dtype: As there.
    """
    tensors, _ = _tensors(got_ocr2, "got_ocr2", _SAM_NAMES, "sam_model.")
    missing = [name for name in COMPRESSOR if name not in tensors]
    if missing:
        raise ValueError(f"`got_ocr2` is no GOT-OCR2: {problems_with(missing=missing, unexpected=(), mismatched=())}.")
    of_clip, config = _tensors(clip, "clip", _CLIP_NAMES, "vision_model.")
    return _joined(tensors, of_clip, config, feature_mode, dtype)


def _joined(
    sam: dict[str, torch.Tensor],
    clip: dict[str, torch.Tensor],
    clip_config: dict[str, Any],
    feature_mode: FeatureMode,
    dtype: torch.dtype,
) -> DeepSeekOCRVisionModel:
    """A model with both parts' weights, checked to be all that are not newly initialised."""
    shapes = {name: tuple(tensor.shape) for name, tensor in (sam | clip).items()}
    width = shapes.get(POSITIONS, (0, 0))[1]
    for name, channels in zip(COMPRESSOR, (COMPRESSOR_WIDTH, width), strict=True):
        shapes.setdefault(name, (channels,))
    config = config_of_shapes(shapes, num_clip_heads=clip_config.get("num_attention_heads"))
    config.feature_mode = feature_mode
    config.clip_config.hidden_act = clip_config.get("hidden_act", config.clip_config.hidden_act)
    config.clip_config.grid_size = config.image_size // config.patch_size
    model = DeepSeekOCRVisionModel(config)
    own = model.state_dict()
    weights = {name: tensor for name, tensor in (sam | clip).items() if name in own}
    if POSITIONS in weights:
        weights[POSITIONS] = _resized(weights[POSITIONS], config.clip_config.grid_size)
    _require_all(own, weights)
    model.load_state_dict(weights, strict=False)
    return model.to(dtype).eval()  # type: ignore[arg-type]  # transformers wraps it as a plain function


def _require_all(own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    stages = ("sam_model.", "vision_model.")
    missing = [name for name in own if name.startswith(stages) and name not in weights and name not in COMPRESSOR]
    mismatched = [
        (name, tuple(tensor.shape), tuple(own[name].shape))
        for name, tensor in weights.items()
        if tensor.shape != own[name].shape
    ]
    problems = problems_with(missing=missing, unexpected=(), mismatched=mismatched)
    if problems:
        raise ValueError(f"The checkpoints do not make an encoder. {problems}.")
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity.")


def _resized(positions: torch.Tensor, grid_size: int) -> torch.Tensor:
    """A position table, [1 + n x n, C], for another grid; its first row is the class token's."""
    class_token, patches = positions[:1], positions[1:]
    side = round(len(patches) ** 0.5)
    grid = resize_positions(patches.unflatten(0, (side, side)), (grid_size, grid_size), antialias=True)
    return torch.cat([class_token, grid.flatten(0, 1)])


# Checkpoints


def _tensors(
    source: Source, argument: str, renames: tuple[tuple[str, str], ...], prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One stage's tensors under our names, and what its configuration says of the vision part."""
    if isinstance(source, Mapping):
        return _fused(dict(source), _names(source, renames, prefix)), {}
    path = local_checkpoint(source, argument, patterns=("config.json", "*.safetensors*"))
    if path.suffix in (".pth", ".pt"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _fused(tensors, _names(tensors, renames, prefix)), {}
    checkpoint = open_local(path)
    names = _names(checkpoint.tensors, renames, prefix)
    tensors = dict(checkpoint.read({name: [name] for name in names}))
    return _fused(tensors, names), checkpoint.config.get("vision_config", checkpoint.config)


def _names(found: Iterable[str], renames: tuple[tuple[str, str], ...], prefix: str) -> dict[str, str]:
    """Of a checkpoint's names those of the stage's weights, each with the name that `our_name` reads."""
    names = {}
    for name in found:
        renamed = name
        for pattern, replacement in renames:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed.startswith(prefix) and not renamed.endswith(".position_ids"):  # 0, 1, 2, ...
            names[name] = renamed
    return names


def _fused(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors under our names, with query, key and value together."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, renamed in names.items():
        ours = our_name(renamed)
        parts.setdefault(ours.key, {})[ours.part or 0] = tensors[name]
    return {key: torch.cat([of_key[part] for part in sorted(of_key)]) for key, of_key in parts.items()}
