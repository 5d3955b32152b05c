"""The composite that the examples share: transformers' LLaVA with our encoder as its vision tower.

Without checkpoints everything is new and small: an encoder of some 1 M parameters, a Llama of some 0.4 M, and a
tokenizer of bytes, so that an example shows something in minutes on a laptop.
"""

import logging
from dataclasses import dataclass, field

import jinja2
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.configuration import preset_of


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
PADDING_SIDE = "left"  # `generate` goes on at the right; who trains chooses a side for itself

# A conversation for a language model that has no chat template of its own.
SIMPLE_CHAT = """{% for message in messages %}
{{ "" if loop.first else "\n" }}{{ message["role"] }}: {{ message["content"] }}
{%- if message["role"] == "assistant" %}{{ eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ "\n" }}assistant:{% endif %}"""
# In front of a chat template that only knows text: pictures become image tokens in it.
PICTURES_AS_TEXT = """{% set flat = namespace(messages=[], text="") %}
{% for message in messages %}
{% set flat.text = message["content"] if message["content"] is string else "" %}
{% for part in ([] if message["content"] is string else message["content"] or []) %}
{% set flat.text = flat.text + ("IMAGE_TOKEN" if part["type"] == "image" else part["text"]) %}
{% endfor %}
{% set flat.messages = flat.messages + [dict(message, content=flat.text)] %}
{% endfor %}
{% set messages = flat.messages %}
""".replace("IMAGE_TOKEN", IMAGE_TOKEN)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of the 256 bytes, so that it spells any text without a vocabulary."""
    specials = ["<pad>", "<eos>", IMAGE_TOKEN]
    vocabulary = {
        token: index for index, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side=PADDING_SIDE,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def load_tokenizer(language_model: str) -> PreTrainedTokenizerBase:
    """A language model's own tokenizer, with a token for the picture and one for padding if it has none."""
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side=PADDING_SIDE)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {language_model} has no `eos_token`, so reading would never end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template if it can hold pictures, or made to; the simple one where there is none."""
    own = tokenizer.get_chat_template() if tokenizer.chat_template else SIMPLE_CHAT
    candidates = (own, PICTURES_AS_TEXT + own, PICTURES_AS_TEXT + SIMPLE_CHAT)
    return next(template for template in candidates if holds_pictures(tokenizer, template))


def holds_pictures(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a chat template writes an image token where a message has a picture."""
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    try:
        written = tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
    except (jinja2.TemplateError, TypeError):  # of a template that joins strings
        return False
    return written.count(IMAGE_TOKEN) == 1 and "What is this?" in written


def build_processor(
    *, encoder: str | None = None, language_model: str | None = None, page_size: int | None = None
) -> LlavaProcessor:
    """What turns pictures and text into the composite's inputs. Each `<image>` becomes as many as there are tokens."""
    tokenizer = load_tokenizer(language_model) if language_model else byte_tokenizer()
    tokenizer.chat_template = chat_template(tokenizer)
    config = encoder_config(encoder, page_size=page_size)
    image_processor = build_image_processor(encoder, config, size=page_size or config.image_size)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def build_image_processor(
    encoder: str | None, config: DeepSeekOCRVisionConfig, *, size: int
) -> DeepSeekOCRVisionImageProcessor:
    """The image processor saved with the encoder; where there is none, the one that goes with its feature mode."""
    if encoder is not None:
        try:
            return DeepSeekOCRVisionImageProcessor.from_pretrained(encoder, size=size)
        except OSError:
            logger.warning("%s holds no image processor; using the preset of its feature mode.", encoder)
    return DeepSeekOCRVisionImageProcessor(preset_of(config.feature_mode), size=size)


def encoder_config(encoder: str | None, *, page_size: int | None) -> DeepSeekOCRVisionConfig:
    """The configuration of the encoder to start from; of a new one, some 1 M parameters instead of 400."""
    if encoder:
        return DeepSeekOCRVisionConfig.from_pretrained(encoder)
    page_size = page_size or 128
    # 0.05 and not the usual 0.02: so small a model learns sooner from larger weights.
    sam_config = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "mlp_dim": 384,
        "window_size": 4,
        "global_attn_indexes": [2],
        "output_channels": 64,
        "downsample_channels": [96, 128],
        "image_size": page_size,
        "initializer_range": 0.05,
    }
    clip_config = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "grid_size": page_size // 64,
        "initializer_range": 0.05,
    }
    return DeepSeekOCRVisionConfig(sam_config, clip_config)


def text_config(language_model: str | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of the language model to start from, or of a new Llama of some 0.4 M parameters."""
    if language_model:
        return AutoConfig.from_pretrained(language_model)
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_model(
    processor: LlavaProcessor,
    *,
    encoder: str | None = None,
    language_model: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlavaForConditionalGeneration:
    """The composite: our encoder as the vision tower, a projector, and a language model.

    Strategy `full` and layer -1: the encoder gives no class token to drop, and its last hidden state is its result.
    """
    size = processor.image_processor.size
    language_config = text_config(language_model, processor.tokenizer)
    config = LlavaConfig(
        vision_config=encoder_config(encoder, page_size=size["height"]),
        text_config=language_config,
        image_token_index=processor.image_token_id,
        image_seq_length=processor.image_processor.num_image_tokens(size["height"], size["width"]),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language_config.tie_word_embeddings,
    )
    if encoder is None and language_model is None:
        return LlavaForConditionalGeneration(config).to(dtype)
    return join_checkpoints(config, processor, encoder=encoder, language_model=language_model, dtype=dtype)


def join_checkpoints(
    config: LlavaConfig,
    processor: LlavaProcessor,
    *,
    encoder: str | None,
    language_model: str | None,
    dtype: torch.dtype,
) -> LlavaForConditionalGeneration:
    """Put pretrained parts into a composite; what neither of them has, such as the projector, is drawn anew."""
    weights = {}
    if encoder:
        tower = DeepSeekOCRVisionModel.from_pretrained(encoder, dtype=dtype)
        weights |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    causal = load_language_model(language_model, dtype=dtype) if language_model else None
    if causal:
        base = causal.base_model.state_dict()
        weights |= {f"model.language_model.{name}": tensor for name, tensor in base.items()}
        weights["lm_head.weight"] = causal.get_output_embeddings().weight
    # The tensors are taken as they are, so a language model is in memory once, and nothing of its size is drawn.
    model = LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    model.config.name_or_path = model.name_or_path = ""  # transformers writes the text "None"
    if len(processor.tokenizer) > config.text_config.vocab_size:
        model.resize_token_embeddings(len(processor.tokenizer))
    if causal:
        model.generation_config = causal.generation_config  # it may know more ends of a turn than one
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def load_language_model(checkpoint: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """A pretrained language model.

    Raises:
        ValueError: LLaVA cannot hold it: it only ties embeddings that go by the name that Llama gives them.
    """
    causal = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    if causal.config.tie_word_embeddings and not hasattr(causal.base_model, "embed_tokens"):
        raise ValueError(
            f"The language model {checkpoint} is a {type(causal).__name__}, whose output is tied to its input "
            "embeddings; LLaVA ties these only where they are called `embed_tokens`, as in Llama and Qwen."
        )
    return causal


# How it is trained


@dataclass
class SmallModelArguments(TrainingArguments):
    """transformers' `TrainingArguments` with defaults that suit the small model, and pictures in the batches."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=200, metadata={"help": "Steps in which the learning rate rises from 0."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep of each run."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin memory, for GPUs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave it: the collator needs the pictures."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate the loss alone while training."})
    report_to: str = field(default="none", metadata={"help": "Where Trainer reports to, such as `tensorboard`."})
