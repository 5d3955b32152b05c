"""What is said of a checkpoint that does not hold the model's weights, where transformers would go on regardless."""

from typing import Any


SHOWN_KEYS = 10

# How the keys of checkpoints that people mistake for this encoder's begin; the first that fits counts.
_LOOKALIKES = {
    "transformers' Unlimited-OCR": ("sam_encoder.", "vision_encoder.encoder.", "model.vision_tower.sam_encoder."),
    "a whole composite around this encoder": ("model.vision_tower.", "vision_tower."),
    "a CLIP model": ("vision_model.encoder.", "text_model.", "visual."),
    "a segment-anything model": ("image_encoder.", "vision_encoder.layers.", "mask_decoder.", "prompt_encoder."),
    "a language model": ("transformer.h.",),
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
    missing = sorted(loading_info["missing_keys"])
    unexpected = sorted(loading_info["unexpected_keys"])
    mismatched = sorted(loading_info["mismatched_keys"])
    if len(missing) + len(mismatched) == num_expected:
        raise ValueError(f"This is not a DeepSeek-OCR vision checkpoint: {_lookalike(unexpected)}.")
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_shown(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are not of this model: {_shown(unexpected)}")
    if mismatched and not allow_mismatched:
        shapes = [f"{key} (found {list(found)}, expected {list(expected)})" for key, found, expected in mismatched]
        problems.append(f"{len(mismatched)} tensors have another shape: {_shown(shapes)}")
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the model. {'; '.join(problems)}. Pass `strict=False` to load what fits and "
            "draw the rest anew."
        )


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
