"""Parts of a composite that need no checkpoint: small and new, so that something shows in minutes on a laptop."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deepseek_ocr_vision.composites.prompts import IMAGE_TOKEN
from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig


PADDING_SIDE = "left"  # `generate` continues on the right; training code chooses a side itself


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of the 256 bytes, so that it spells any text without a vocabulary."""
    tokens = ["<pad>", "<eos>", IMAGE_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
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


def small_encoder_config(page_size: int = 128) -> DeepSeekOCRVisionConfig:
    """The configuration of an encoder of about 1 M parameters instead of 400 M.

    Args:
        page_size: Side of a page in pixels, a multiple of 64.
    """
    # 0.05 and not the usual 0.02: so small a model learns sooner from larger weights.
    shared: dict[str, Any] = {"initializer_range": 0.05}
    sam = shared | {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_dim": 384}
    sam |= {"window_size": 4, "global_attn_indexes": [2], "image_size": page_size}
    sam |= {"output_channels": 64, "downsample_channels": [96, 128]}
    clip = shared | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    return DeepSeekOCRVisionConfig(sam, clip | {"grid_size": page_size // 64})


def small_text_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The configuration of a Llama of about 0.4 M parameters that writes a tokenizer's tokens."""
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
