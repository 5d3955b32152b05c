"""What the tensors of a checkpoint are called, and how they match those of a model.

Three spellings are in use. The released checkpoints of DeepSeek-OCR and Unlimited-OCR, `model.sam_model...` and
`model.vision_model...`; ours, the same without `model.`; and the modules of transformers' Unlimited-OCR,
`model.vision_tower.sam_encoder...` and so on, with query, key and value apart. transformers also writes mixtures, so
each name is brought to ours part by part, whatever file it comes from.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, NoReturn

from deepseek_ocr_vision.modeling.loading_deepseek_ocr_vision import problems_with


PARTS = "qkv"

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # The two stages, wherever they hang.
        (r"^(?:model\.)?(?:vision_tower\.)?(?:sam_encoder|sam_model)\.", "sam_model."),
        (r"^(?:model\.)?(?:vision_tower\.)?vision_encoder\.encoder\.", "vision_model.transformer."),
        (r"^(?:model\.)?(?:vision_tower\.)?vision_encoder\.", "vision_model."),
        (r"^(?:model\.)?(?:vision_tower\.)?vision_model\.", "vision_model."),
        # SAM and its compressor.
        (r"^sam_model\.layers\.", "sam_model.blocks."),
        (r"^(sam_model\.blocks\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
        (r"^sam_model\.patch_embed\.projection\.", "sam_model.patch_embed.proj."),
        (r"^sam_model\.neck\.conv1\.", "sam_model.neck.0."),
        (r"^sam_model\.neck\.layer_norm1\.", "sam_model.neck.1."),
        (r"^sam_model\.neck\.conv2\.", "sam_model.neck.2."),
        (r"^sam_model\.neck\.layer_norm2\.", "sam_model.neck.3."),
        (r"^sam_model\.proj\.conv1\.", "sam_model.net_2."),
        (r"^sam_model\.proj\.conv2\.", "sam_model.net_3."),
        # What lies between the encoder and the language model.
        (r"^(?:model\.)?(?:multi_modal_projector|(?:vision_tower\.)?projector\.layers)\.", "projector.layers."),
        (r"^(?:model\.)?(?:vision_tower\.)?view_sep[ae]rator$", "view_seperator"),
        (r"^(?:model\.)?(?:vision_tower\.)?image_newline$", "image_newline"),
        # The language model.
        (r"^(?:model\.)?(?:language_model\.)?(embed_tokens|layers|norm)\.", r"\1."),
    )
)
_SPLIT = re.compile(r"^(vision_model\.transformer\.layers\.\d+\.self_attn\.)([qkv])_proj(\.weight|\.bias)$")
# In the released checkpoints, and used by nothing.
_UNUSED = re.compile(r"^vision_model\.embeddings\.(patch_embedding\.|position_ids$)")
# Of the language model around the encoder.
_LANGUAGE_MODEL = re.compile(r"^lm_head\.|^(model\.)?(embed_tokens|layers|norm|language_model)\.")
_VISION = re.compile(r"^(sam_model|vision_model|projector)\.|^(image_newline|view_seperator)$")
# What a feature mode may do without: each is a part that another one has.
_OF_OTHER_FEATURE_MODES = re.compile(
    r"^projector\.|^vision_model\.embeddings\.class_embedding$|^(image_newline|view_seperator)$"
)

# How the keys of checkpoints that people mistake for this encoder's begin; the first that fits counts.
_LOOKALIKES = {
    "transformers' Unlimited-OCR": ("sam_encoder.", "vision_encoder.encoder.", "model.vision_tower.sam_encoder."),
    "a whole composite around this encoder": ("model.vision_tower.", "vision_tower."),
    "a CLIP model": ("vision_model.encoder.", "text_model.", "visual.", "embeddings.class_embedding"),
    "a segment-anything model": ("image_encoder.", "vision_encoder.layers.", "mask_decoder.", "prompt_encoder."),
    "DeepSeek-OCR-2": ("model.qwen2_model.", "model.vision_tower.vision_encoder.layers."),
    "a language model": ("transformer.h.", "model.layers.", "lm_head."),
}


class Name(NamedTuple):
    """What a checkpoint's tensor is to us."""

    key: str  # our name of it, or of the fused projection that it is a third of
    part: int | None = None  # 0, 1 or 2 for query, key or value of a projection that is split in the checkpoint


def our_name(name: str) -> Name:
    """Bring a checkpoint's name to ours; a name of neither spelling stays as it is."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    split = _SPLIT.match(name)
    if split:
        return Name(f"{split[1]}qkv_proj{split[3]}", PARTS.index(split[2]))
    return Name(name)


def is_vision(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to the encoder, its projector or the special tokens of its sequence."""
    return bool(_VISION.match(our_name(name).key))


def match_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, whole: bool = False
) -> dict[str, list[str]]:
    """Find for each tensor of a model the names of a checkpoint's that it is made of: one, or query, key and value.

    Into a `whole` model a checkpoint has to go with all that it holds.

    Raises:
        ValueError: A tensor is missing, there twice or of another shape, or one is neither the model's nor known to
            go with it; or nothing fits, and the message says what the checkpoint looks like.
    """
    sources = _sources(found)
    if not _has_both_stages(sources):
        raise_foreign(list(found))
    missing, shapes = [], []
    for key, shape in expected.items():
        names = sources.get(key)
        if not names:
            missing.append(key)
        else:
            shapes += _wrong_shapes(names, found, shape)
    unexpected = [
        name for key in sources.keys() - expected.keys() if not _is_known(key, whole=whole) for name in sources[key]
    ]
    problems = problems_with(missing=missing, unexpected=unexpected, mismatched=shapes)
    if problems:
        raise ValueError(f"The checkpoint does not fit the {'model' if whole else 'encoder'}. {problems}.")
    return {key: sources[key] for key in expected}


def raise_foreign(keys: Iterable[str]) -> NoReturn:
    """Refuse a checkpoint of something else, and say what its keys look like."""
    keys = sorted(keys)
    what = f"it holds none of the model's tensors, but {', '.join(keys[:3])}"
    if not keys:
        what = "it holds none of the model's tensors; its keys, if it has any, are those of a language model"
    for name, prefixes in _LOOKALIKES.items():
        if any(key.startswith(prefixes) for key in keys):
            what = f"its keys look like {name} ({', '.join(keys[:3])})"
            break
    raise ValueError(f"This is not a DeepSeek-OCR vision checkpoint: {what}.")


def _sources(found: Iterable[str]) -> dict[str, list[str]]:
    """Our names, each with the checkpoint's that it is made of, in order."""
    parts: dict[str, dict[int | None, str]] = {}
    for name in found:
        ours = our_name(name)
        rivals = parts.setdefault(ours.key, {})
        if ours.part in rivals or (rivals and (ours.part is None or None in rivals)):
            raise ValueError(f"The checkpoint has {ours.key} twice: as {', '.join(rivals.values())} and as {name}.")
        rivals[ours.part] = name
    # A projection of which a third is missing counts as missing.
    complete = {key: names for key, names in parts.items() if None in names or len(names) == len(PARTS)}
    return {
        key: [names[part] for part in sorted(names, key=lambda part: part or 0)] for key, names in complete.items()
    }


def _has_both_stages(keys: Iterable[str]) -> bool:
    """CLIP's own checkpoints have one of the two under our names, DeepSeek-OCR-2's the other."""
    keys = list(keys)
    return all(any(key.startswith(stage) for key in keys) for stage in ("sam_model.", "vision_model.transformer."))


def _is_known(key: str, *, whole: bool) -> bool:
    """Whether a tensor that the model does not have belongs to what surrounds it."""
    return bool(
        _UNUSED.match(key) or (not whole and (_LANGUAGE_MODEL.match(key) or _OF_OTHER_FEATURE_MODES.match(key)))
    )


def _wrong_shapes(
    names: list[str], found: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, shape found and shape expected of those that differ."""
    expected = shape if len(names) == 1 else (shape[0] // len(names), *shape[1:])
    return [(name, found[name], expected) for name in names if tuple(found[name]) != tuple(expected)]
