"""transformers' LLaVA with our encoder as its vision tower, from checkpoints or from small new parts."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deepseek_ocr_vision.composites.prompts import IMAGE_TOKEN
from deepseek_ocr_vision.composites.small import PADDING_SIDE, byte_tokenizer, small_encoder_config, small_text_config
from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor
from deepseek_ocr_vision.weights import compare_checksums, default_image_processor


if TYPE_CHECKING:
    # transformers imports these two when they are first asked for; importing this package need not wait for them.
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


logger = logging.getLogger(__name__)

README = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# A LLaVA with a DeepSeek-OCR vision encoder

To load it, install the package that has its encoder: `pip install deepseek-ocr-vision`.

```python
import deepseek_ocr_vision  # registers the encoder
from transformers import LlavaForConditionalGeneration, LlavaProcessor

folder = "."  # this folder, or its id on the Hub
model = LlavaForConditionalGeneration.from_pretrained(folder)
processor = LlavaProcessor.from_pretrained(folder)
```
"""
# A conversation for a language model that has no chat template of its own.
SIMPLE_CHAT = """{% for message in messages %}
{{ "" if loop.first else "\n" }}{{ message["role"] }}: {{ message["content"] }}
{%- if message["role"] == "assistant" %}{{ eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ "\n" }}assistant:{% endif %}"""
# In front of a chat template that only knows text: images become image tokens in it.
IMAGES_AS_TEXT = """{% set flat = namespace(messages=[], text="") %}
{% for message in messages %}
{% set flat.text = message["content"] if message["content"] is string else "" %}
{% for part in ([] if message["content"] is string else message["content"] or []) %}
{% set flat.text = flat.text + ("IMAGE_TOKEN" if part["type"] == "image" else part["text"]) %}
{% endfor %}
{% set flat.messages = flat.messages + [dict(message, content=flat.text)] %}
{% endfor %}
{% set messages = flat.messages %}
""".replace("IMAGE_TOKEN", IMAGE_TOKEN)


def build_llava(
    encoder: str | None = None,
    *,
    language_model: str | None = None,
    page_size: int | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> "tuple[LlavaForConditionalGeneration, LlavaProcessor]":
    """Build a LLaVA around an encoder: the model, and the processor with its chat template.

    What a composite needs of the encoder is set: its last hidden state, without a class token to drop, 64 pixels a
    token, and how many special tokens the feature mode `"sequence"` adds. Pages come without tiles, of which LLaVA
    knows nothing. The projector is newly initialised. The language model keeps its chat template, extended to hold
    images if it could not; where it has none, a turn is a line, `user: ...` or `assistant: ...`, and the
    end-of-sequence token ends what the assistant says.

    Args:
        encoder: Checkpoint of the encoder (folder or Hub id). Without it, a small new one of about 1 M parameters.
        language_model: Checkpoint of the language model (folder or Hub id), with its tokenizer. Without it, a small
            new Llama of about 0.4 M parameters whose tokens are bytes.
        page_size: Side of the square, in pixels, that a page is resized to; a multiple of 64. Defaults to the
            encoder's `image_size`, and to 128 for a new one.
        dtype: Of the weights.

    Returns:
        Model and processor. `save_pretrained` of both, into one folder, makes a checkpoint.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: The language model cannot be used in a LLaVA: it has no end-of-sequence token, or ties embeddings
            that LLaVA does not find.
    """
    processor = build_processor(encoder=encoder, language_model=language_model, page_size=page_size)
    return build_model(processor, encoder=encoder, language_model=language_model, dtype=dtype), processor


def save_llava(
    model: "LlavaForConditionalGeneration",
    processor: "LlavaProcessor",
    folder: str | os.PathLike[str],
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save model and processor into one folder, with a README that says what has to be installed to load it.

    transformers looks for no code behind the configuration of a part, so a composite cannot carry that of its encoder.

    Args:
        model: The composite.
        processor: What makes its inputs.
        folder: The folder, which is made.
        state_dict: Weights to save in place of the model's own, such as those that FSDP gathered.

    Raises:
        OSError: The folder cannot be written to.
    """
    options: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    (Path(folder) / "README.md").write_text(README, "utf-8")


# The processor


def build_processor(
    *, encoder: str | None = None, language_model: str | None = None, page_size: int | None = None
) -> "LlavaProcessor":
    """What turns images and text into the composite's inputs. Each `<image>` becomes as many as there are tokens.

    The arguments and errors are those of `build_llava`.
    """
    tokenizer = load_tokenizer(language_model) if language_model else byte_tokenizer()
    tokenizer.chat_template = chat_template(tokenizer)
    config = encoder_config(encoder, page_size=page_size)
    image_processor = build_image_processor(
        encoder, config, size=config.image_size if page_size is None else page_size
    )
    count = partial(image_processor.num_image_tokens, *image_processor.size.values())
    return transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=count(feature_mode=config.feature_mode) - count(),
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def load_tokenizer(language_model: str) -> PreTrainedTokenizerBase:
    """A language model's own tokenizer, with a token for the image, and one for padding if it has none."""
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side=PADDING_SIDE)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {language_model} has no `eos_token`, so reading would never end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template, extended to hold images if need be; the simple one where there is none."""
    own = tokenizer.get_chat_template() if tokenizer.chat_template else SIMPLE_CHAT
    candidates = (own, IMAGES_AS_TEXT + own, IMAGES_AS_TEXT + SIMPLE_CHAT)
    return next(template for template in candidates if holds_images(tokenizer, template))


def holds_images(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a chat template writes an image token where a message has an image."""
    probe: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    try:
        written = str(tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False))
    except (jinja2.TemplateError, TypeError):  # of a template that joins strings
        return False
    return written.count(IMAGE_TOKEN) == 1 and "What is this?" in written


def build_image_processor(
    encoder: str | None, config: DeepSeekOCRVisionConfig, *, size: int
) -> DeepSeekOCRVisionImageProcessor:
    """The image processor saved with the encoder, less tiles; without one, that which goes with its feature mode."""
    if encoder is not None:
        try:
            return DeepSeekOCRVisionImageProcessor.from_pretrained(encoder, size=size, tile_size=None)
        except OSError:
            logger.warning("%s holds no image processor; using the preset of its feature mode.", encoder)
    return default_image_processor(config, size=size)


def encoder_config(encoder: str | None, *, page_size: int | None) -> DeepSeekOCRVisionConfig:
    """The configuration of the encoder to start from, or of a small new one."""
    if encoder:
        return DeepSeekOCRVisionConfig.from_pretrained(encoder)
    return small_encoder_config(128 if page_size is None else page_size)


# The model


def build_model(
    processor: "LlavaProcessor",
    *,
    encoder: str | None = None,
    language_model: str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> "LlavaForConditionalGeneration":
    """The composite: our encoder as the vision tower, a projector, and a language model.

    Strategy `full` and layer -1: the encoder gives no class token to drop, and its last hidden state is its result.
    The other arguments and the errors are those of `build_llava`.

    Args:
        processor: What `build_processor` made from the same checkpoints; it decides page size and vocabulary.
    """
    size = processor.image_processor.size
    language_config = text_config(language_model, processor.tokenizer)
    vision_config = encoder_config(encoder, page_size=size["height"])
    num_image_tokens = processor.image_processor.num_image_tokens
    config = transformers.LlavaConfig(
        vision_config=vision_config,
        text_config=language_config,
        image_token_index=processor.image_token_id,
        image_seq_length=num_image_tokens(*size.values(), feature_mode=vision_config.feature_mode),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language_config.tie_word_embeddings,
    )
    if encoder is None and language_model is None:
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return join_checkpoints(config, processor, encoder=encoder, language_model=language_model, dtype=dtype)


def text_config(language_model: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the language model to start from, or of a small new one."""
    return AutoConfig.from_pretrained(language_model) if language_model else small_text_config(tokenizer)


def join_checkpoints(
    config: "transformers.LlavaConfig",
    processor: "LlavaProcessor",
    *,
    encoder: str | None,
    language_model: str | None,
    dtype: torch.dtype | str,
) -> "LlavaForConditionalGeneration":
    """Put pretrained parts into a composite; what neither of them has, such as the projector, is newly initialised."""
    weights: dict[str, torch.Tensor] = {}
    if encoder:
        compare_checksums(encoder)
        tower = DeepSeekOCRVisionModel.from_pretrained(encoder, dtype=dtype)
        weights |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    causal = load_language_model(language_model, dtype=dtype) if language_model else None
    if causal:
        base = causal.base_model.state_dict()
        weights |= {f"model.language_model.{name}": tensor for name, tensor in base.items()}
        weights["lm_head.weight"] = causal.get_output_embeddings().weight
    # The tensors are taken as they are, so a language model is in memory once, and nothing of its size is initialised.
    options: dict[str, Any] = {"config": config, "state_dict": weights, "dtype": dtype}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(None, **options)
    model.config.name_or_path = model.name_or_path = ""  # transformers writes the text "None"
    if len(processor.tokenizer) > config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(processor.tokenizer))
    if causal:
        model.generation_config = causal.generation_config  # it may know more ends of a turn than one
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def load_language_model(checkpoint: str, *, dtype: torch.dtype | str) -> PreTrainedModel:
    """A pretrained language model that LLaVA can hold: it only ties embeddings that have the name of Llama's."""
    causal = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    if causal.config.tie_word_embeddings and not hasattr(causal.base_model, "embed_tokens"):
        raise ValueError(
            f"The language model {checkpoint} is a {type(causal).__name__}, whose output is tied to its input "
            "embeddings; LLaVA ties these only where they are called `embed_tokens`, as in Llama and Qwen."
        )
    return causal
