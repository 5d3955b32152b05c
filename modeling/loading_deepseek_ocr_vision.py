"""What is said of a checkpoint that does not hold the model's weights, where transformers would go on regardless."""

from collections.abc import Iterable
from typing import Any, NoReturn


SHOWN_KEYS = 10

# How the keys of checkpoints that people mistake for this encoder's begin; the first that fits counts.
_LOOKALIKES = {
    "transformers' Unlimited-OCR": ("sam_encoder.", "vision_encoder.encoder.", "model.vision_tower.sam_encoder."),
    "a whole composite around this encoder": ("model.vision_tower.", "vision_tower."),
    "a CLIP model": ("vision_model.encoder.", "text_model.", "visual.", "embeddings.class_embedding"),
    "a segment-anything model": ("image_encoder.", "vision_encoder.layers.", "mask_decoder.", "prompt_encoder."),
    "DeepSeek-OCR-2": ("model.qwen2_model.", "model.vision_tower.vision_encoder.layers."),
    "a language model": ("transformer.h.", "model.layers.", "lm_head."),
}


def check_loading_info(loading_info: dict[str, Any], *, num_expected: int, allow_mismatched: bool) -> None:
    """Refuse a checkpoint that lacks weights, has other shapes, or holds what the model does not know.

    Args:
        loading_info: What transformers' `from_pretrained(output_loading_info=True)` gives.
        num_expected: How many tensors the model has.
        allow_mismatched: Whether tensors of another shape, newly drawn by then, are what the caller asked for.

    Raises:
        ValueError: It names the keys, ten of a kind at the most, and shapes as found and as expected.
    """
    missing, unexpected, mismatched = (
        loading_info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")
    )
    if len(missing) + len(mismatched) == num_expected:
        raise_foreign(unexpected)
    problems = problems_with(missing=missing, unexpected=unexpected, mismatched=[] if allow_mismatched else mismatched)
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the model. {problems}. Pass `strict=False` to load what fits and draw the "
            "rest anew."
        )


def problems_with(
    *, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Iterable, Iterable]]
) -> str:
    """What is wrong with a checkpoint's tensors, in words, ten keys of a kind at the most; nothing if nothing is."""
    missing, unexpected, mismatched = sorted(missing), sorted(unexpected), sorted(mismatched)
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_shown(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are not of this model: {_shown(unexpected)}")
    if mismatched:
        shapes = [f"{key} (found {list(found)}, expected {list(expected)})" for key, found, expected in mismatched]
        problems.append(f"{len(mismatched)} tensors have another shape: {_shown(shapes)}")
    return "; ".join(problems)


def raise_foreign(keys: Iterable[str]) -> NoReturn:
    """Refuse a checkpoint of something else.

    Raises:
        ValueError: It says what the keys look like.
    """
    raise ValueError(f"This is not a DeepSeek-OCR vision checkpoint: {_lookalike(sorted(keys))}.")


def _shown(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN_KEYS} more" if len(items) > SHOWN_KEYS else ""
    return ", ".join(items[:SHOWN_KEYS]) + more


def _lookalike(unexpected: list[str]) -> str:
    if not unexpected:
        return "it holds none of the model's tensors; its keys, if it has any, are those of a language model"
    for name, prefixes in _LOOKALIKES.items():
        if any(key.startswith(prefixes) for key in unexpected):
            return f"its keys look like {name} ({_shown(unexpected[:3])})"
    return f"it holds none of the model's tensors, but {_shown(unexpected)}"
