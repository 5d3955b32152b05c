"""What DeepSeek-OCR is asked: the prompts that it was trained with, and the token that stands for an image."""

IMAGE_TOKEN = "<image>"

PROMPTS = {
    "text": "<image>\nFree OCR.",
    "markdown": "<image>\n<|grounding|>Convert the document to markdown.",
    "ocr": "<image>\n<|grounding|>OCR this image.",
    "figure": "<image>\nParse the figure.",
    "describe": "<image>\nDescribe this image in detail.",
}
"""The prompts that the released model was trained with."""


def prompt_of(prompt: str) -> str:
    """A prompt of `PROMPTS` by its name, or one in full, its ends without spaces, as in the released `infer`.

    Raises:
        ValueError: It does not hold `<image>` once.
    """
    full = PROMPTS.get(prompt, prompt).strip()
    if full.count(IMAGE_TOKEN) != 1:
        raise ValueError(f"`prompt` is {prompt!r}; it has to hold {IMAGE_TOKEN} once, or be one of {list(PROMPTS)}.")
    return full
