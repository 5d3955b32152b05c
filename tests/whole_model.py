"""What the tests of the whole DeepSeek-OCR share: tiny models, released checkpoints of them, a tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from helpers import GOLDEN, golden_weight, tiny_config, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor


# The rule of WHOLE_MODEL.md: the routers' seeds are salted, so that no choice of experts is near a tie.
SALT = {"layers.1.mlp.gate.weight": "#182", "layers.2.mlp.gate.weight": "#390"}
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<image>", "<|grounding|>")
IMAGE_TOKEN_ID = 3
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

HAS_WHOLE_MODEL = hasattr(transformers, "UnlimitedOcrForConditionalGeneration")
NO_WHOLE_MODEL = f"transformers {transformers.__version__} has no Unlimited-OCR; 5.21 is the first"
needs_whole_model = pytest.mark.skipif(not HAS_WHOLE_MODEL, reason=NO_WHOLE_MODEL)

if HAS_WHOLE_MODEL:
    from deepseek_ocr_vision.composites import (
        DeepSeekOCRConfig,
        DeepSeekOCRForConditionalGeneration,
        DeepSeekOCRProcessor,
    )
    from deepseek_ocr_vision.composites.deepseek_ocr_weights import fields_of_config, released_views


def tiny_whole_config(*, text_config: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A config around the tiny encoder: one dense layer, two with four experts, byte-sized vocabulary."""
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }
    vision_config = tiny_config(feature_mode="concat")
    defaults = {"vision_config": vision_config, "image_token_id": IMAGE_TOKEN_ID}
    return DeepSeekOCRConfig(text_config=text | (text_config or {}), **(defaults | fields))


def tiny_whole_model(**fields: Any) -> Any:
    """A tiny whole model, in `eval()`."""
    return DeepSeekOCRForConditionalGeneration(tiny_whole_config(**fields)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the released one's special tokens."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=["<image>", "<|grounding|>"],
    )


def tiny_processor(**fields: Any) -> Any:
    """A processor of pages of 128 pixels, 2 x 2 tokens and 3 special tokens each."""
    return DeepSeekOCRProcessor(DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=128, **fields), tiny_tokenizer())


def released_whole_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A model's weights in the released layout, with CLIP's patch embedding, which is there and used by nothing."""
    tensors = {}
    for key, view in released_views(model.state_dict()).items():
        tensors[key if key.startswith("lm_head") else f"model.{key}"] = view.detach().clone()
    width = model.config.vision_config.clip_config.hidden_size
    draw = torch.Generator().manual_seed(0)
    unused = torch.randn(width, 3, 14, 14, generator=draw).to(model.dtype)
    return tensors | {"model.vision_model.embeddings.patch_embedding.weight": unused}


def write_released(folder: Path, model: Any, *, num_shards: int = 3, tensors: dict | None = None) -> Path:
    """A model as a released checkpoint: DeepSeek's configuration, its names, several files, a tokenizer."""
    tensors = released_whole_tensors(model) if tensors is None else tensors
    write_checkpoint(folder, tensors, model.config.vision_config, num_shards=num_shards)
    contents = json.loads((folder / "config.json").read_text())
    text = model.config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_routed_experts")
    names += ("num_experts_per_tok", "max_position_embeddings", "n_group", "topk_group", "topk_method")
    names += ("bos_token_id", "eos_token_id")
    contents["language_config"] = {name: getattr(text, name) for name in names}
    contents["language_config"] |= {"first_k_dense_replace": 1, "use_mla": False, "kv_lora_rank": None}
    (folder / "config.json").write_text(json.dumps(contents))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def unlimited_config(config: Any) -> Any:
    """transformers' own configuration of the same sizes, with a window over all tokens."""
    sam = config.vision_config.sam_config.to_dict()
    clip = config.vision_config.clip_config.to_dict()
    for stage in (sam, clip):
        stage.pop("model_type")
    clip |= {"image_size": 14 * clip["grid_size"], "patch_size": 14}
    text = config.text_config.to_dict()
    text |= {"layer_types": None, "sliding_window": text["max_position_embeddings"]}
    vision = {"sam_config": sam, "encoder_config": clip}
    return transformers.UnlimitedOcrConfig(
        vision_config=vision, text_config=text, image_token_id=config.image_token_id
    )


def golden_whole_model(golden_weights: dict[str, torch.Tensor]) -> Any:
    """The model of WHOLE_MODEL.md around golden weights, of which the encoder's are shared and not to be changed."""
    contents = json.loads((GOLDEN / "whole_model_config.json").read_text())
    config = DeepSeekOCRConfig.from_dict(fields_of_config(contents) | {"image_token_id": 1000})
    with init_empty_weights(include_buffers=False):
        model = DeepSeekOCRForConditionalGeneration(config)
    weights = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    for key, view in released_views(weights).items():
        if key in golden_weights:
            assert view.shape == golden_weights[key].shape
            view.set_(golden_weights[key])
        else:
            view.copy_(golden_weight(key, tuple(view.shape), salt=SALT.get(key, "")))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True)
