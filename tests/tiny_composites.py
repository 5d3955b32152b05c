"""Composites around a tiny encoder, for the tests: LLaVA and the others that take it as their vision tower."""

import torch
import transformers
from helpers import pixels, tiny_config
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from deepseek_ocr_vision.composites.small import byte_tokenizer


PINPOINTS = [[128, 256], [256, 128], [256, 256]]
IMAGE_TOKEN = 31
LANGUAGE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_llava(feature_mode: str = "residual", *, vocab_size: int = 32, **fields) -> LlavaForConditionalGeneration:
    """A LLaVA with our tower; the layer and the strategy are what the tower needs."""
    text_config = LlamaConfig(**LANGUAGE, vocab_size=vocab_size, pad_token_id=0, initializer_range=0.2)
    defaults = {
        "vision_config": tiny_config(feature_mode=feature_mode),
        "text_config": text_config,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    return LlavaForConditionalGeneration(LlavaConfig(**(defaults | fields)))


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """An image of 2 x 2 tokens and two words, `batch` times."""
    row = torch.tensor([1] + [IMAGE_TOKEN] * 4 + [5, 6])
    return {"input_ids": row.repeat(batch, 1), "pixel_values": pixels(batch)}


def tiny_encoder_decoder(feature_mode: str) -> VisionEncoderDecoderModel:
    """A decoder that attends to the tokens by cross-attention, as TrOCR's does."""
    decoder = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, initializer_range=0.2, bos_token_id=1, eos_token_id=1
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_config(feature_mode=feature_mode), decoder, pad_token_id=0, decoder_start_token_id=1
    )
    return VisionEncoderDecoderModel(config=config)


def tiny_dual_encoder(feature_mode: str) -> VisionTextDualEncoderModel:
    """Both encoders of contrastive training."""
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        tiny_config(feature_mode=feature_mode), BertConfig(**LANGUAGE, vocab_size=300), projection_dim=8
    )
    return VisionTextDualEncoderModel(config=config)


def tiny_tiling_llava(kind: str, feature_mode: str) -> PreTrainedModel:
    """A LlavaNext or LlavaOnevision, which cut a page into tiles of the tower's own size."""
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tiny_config(feature_mode=feature_mode),
        text_config=LlamaConfig(**LANGUAGE, vocab_size=300),
        image_token_index=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def tiling_processor() -> LlavaNextProcessor:
    """What prepares pages and text for `tiny_tiling_llava`."""
    tiling = LlavaNextImageProcessor(
        size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}, image_grid_pinpoints=PINPOINTS
    )
    tokenizer = byte_tokenizer()
    return LlavaNextProcessor(tiling, tokenizer, patch_size=64, vision_feature_select_strategy="full")
