"""Pages to text by a whole DeepSeek-OCR: greedily and without running in circles, as its released `infer` does."""

import os
from typing import Any

import torch
from transformers import LogitsProcessorList

from deepseek_ocr_vision.composites.deepseek_ocr import DeepSeekOCRForConditionalGeneration, NoRepeatNGram
from deepseek_ocr_vision.composites.deepseek_ocr_processor import DeepSeekOCRProcessor
from deepseek_ocr_vision.composites.prompts import prompt_of
from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import require_integer
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import ModeName
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import input_device
from deepseek_ocr_vision.modeling.device import default_device


def load_reader(
    source: str | os.PathLike,
    *,
    mode: ModeName = "gundam",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **hub_options: Any,
) -> tuple[DeepSeekOCRForConditionalGeneration, DeepSeekOCRProcessor]:
    """Load a model and its processor, ready to read pages.

    Args:
        source: A Hub id or a folder, with the tokenizer.
        mode: The resolution of pages.
        dtype: What to convert the weights to; see `DeepSeekOCRForConditionalGeneration.from_deepseek_ocr`.
        device: Where to compute; by default the accelerator there is, or the CPU.
        hub_options: `revision`, `token`, `cache_dir` and `local_files_only`.

    Raises:
        OSError: It is not there or cannot be fetched.
        ValueError: It is no whole DeepSeek-OCR, or is corrupt.
    """
    processor = DeepSeekOCRProcessor.from_deepseek_ocr(source, mode=mode, **hub_options)
    model = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(source, dtype=dtype, **hub_options)
    return model.to(device or default_device()), processor  # type: ignore[arg-type]  # wrapped as a plain function


@torch.no_grad()
def read_page(
    model: DeepSeekOCRForConditionalGeneration,
    processor: DeepSeekOCRProcessor,
    page: Any,
    *,
    prompt: str = "markdown",
    max_new_tokens: int | None = None,
    ngram_size: int = 20,
    window_size: int | None = None,
    streamer: Any = None,
) -> str:
    """Read a page.

    Args:
        model: The model.
        processor: Its processor, whose mode decides the resolution.
        page: The page, in any form that the image processor takes.
        prompt: A name in `PROMPTS`, or a text with `<image>`.
        max_new_tokens: Tokens at the most. By default as many as the model has positions for.
        ngram_size: Length in tokens of what is not written twice, as in the released `infer`; 0 for no such rule.
        window_size: How many tokens back that counts; all if `None`.
        streamer: What is given the tokens as they come, such as transformers' `TextStreamer`.

    Returns:
        The text, without special tokens and spaces at its ends.

    Raises:
        ValueError: The prompt or the page cannot be meant, the page leaves no position for a token, or
            `max_new_tokens` is below 1.
        OSError: The page is a file that is missing or broken.
    """
    inputs = processor(page, prompt_of(prompt), return_tensors="pt").to(input_device(model))
    length = inputs["input_ids"].shape[1]
    room = model.config.text_config.max_position_embeddings - length
    if room < 1:
        raise ValueError(f"The page and its prompt are {length} tokens, the model has {length + room} positions.")
    limit = room if max_new_tokens is None else require_integer("max_new_tokens", max_new_tokens, at_least=1)
    options: dict[str, Any] = {"max_new_tokens": min(room, limit), "do_sample": False}
    if ngram_size:
        options["logits_processor"] = LogitsProcessorList([NoRepeatNGram(ngram_size, window_size)])
    output = model.generate(**inputs, **options, streamer=streamer)
    return processor.decode(output[0, length:], skip_special_tokens=True).strip()
