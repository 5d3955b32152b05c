"""Weights of the whole DeepSeek-OCR in and out: released checkpoints, and what transformers saves of Unlimited-OCR.

Each tensor of a released checkpoint is one of the model's, or a part of one: transformers keeps the experts of a layer
in two tensors, the release each expert by itself. So reading and writing go through views of the model's own tensors
under the released names, and nothing is in memory twice.
"""

import json
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError

from deepseek_ocr_vision.composites.prompts import IMAGE_TOKEN
from deepseek_ocr_vision.modeling.loading_deepseek_ocr_vision import problems_with
from deepseek_ocr_vision.saving.saving_deepseek_ocr_vision import CHECKSUMS
from deepseek_ocr_vision.weights.before_loading import open_before_loading
from deepseek_ocr_vision.weights.checkpoints import LocalCheckpoint, compare_checksums, open_local
from deepseek_ocr_vision.weights.names import match_tensors, our_name
from deepseek_ocr_vision.weights.reading import chosen_dtype, widest_dtype
from deepseek_ocr_vision.weights.repository import HUB_OPTIONS, local_checkpoint
from deepseek_ocr_vision.weights.safetensors_files import require_float
from deepseek_ocr_vision.weights.sizes import MAX_MORE_LAYERS, check_layers, config_of_checkpoint, expected_shapes
from deepseek_ocr_vision.weights.writing import WriteReport, weights_of, write_weights


# What of a repository a model and its processor are made of.
_NEEDED_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", CHECKSUMS)

# The language model's fields in DeepSeek's configuration that have the same names in transformers' one.
_LANGUAGE_FIELDS: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_LANGUAGE_FIELDS += ("hidden_act", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "attention_bias")
_LANGUAGE_FIELDS += ("max_position_embeddings", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")
_LANGUAGE_FIELDS += ("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_LANGUAGE_FIELDS += ("n_group", "topk_group", "topk_method", "routed_scaling_factor", "first_k_dense_replace")
# What transformers' classes compute in one way only. DeepSeek's configuration can say otherwise; its default is this.
_BUILT_IN = {
    "use_mla": False,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_OUR_PREFIXES = (
    ("model.vision_tower.", ""),
    ("model.multi_modal_projector.", "projector.layers."),
    ("model.view_separator", "view_seperator"),
    ("model.language_model.", ""),
    ("model.", ""),
)
_COUNTS = {
    "num_hidden_layers": r"^layers\.(\d+)\.",
    "n_routed_experts": r"\.mlp\.experts\.(\d+)\.",
}
_OUTPUT = "lm_head.weight"
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def load_whole(model_class: Any, source: str | os.PathLike, *, dtype: str | torch.dtype | None, **options: Any) -> Any:
    """What `DeepSeekOCRForConditionalGeneration.from_deepseek_ocr` says."""
    hub_options = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    checkpoint = open_local(local_checkpoint(source, "source", patterns=_NEEDED_FILES, **hub_options))
    compare_checksums(checkpoint.folder, allow_missing=not os.path.exists(source))
    stated = {"image_token_id": image_token_of(checkpoint.folder)} | fields_of_config(checkpoint.config)
    fields = {name: value for name, value in stated.items() if value is not None} | options
    config = _config_for(model_class, fields, checkpoint)
    expected = _less_tied(_released_shapes(model_class, config, checkpoint), config, checkpoint.tensors)
    sources = match_tensors(checkpoint.shapes, expected, whole=True)
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    chosen = chosen_dtype(dtype, stored=widest_dtype(checkpoint, sources))
    weights = {
        name: torch.empty(parameter.shape, dtype=torch.float32 if is_router(name) else chosen)
        for name, parameter in model.state_dict().items()
    }
    views = released_views(weights, checkpoint.tensors)
    for key, tensor in checkpoint.read(sources):
        views[key].copy_(tensor)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.config.dtype = chosen
    model.generation_config.pad_token_id = config.text_config.eos_token_id
    return model.eval()


def check_whole(
    model_class: Any,
    source: str | os.PathLike,
    contents: dict[str, Any],
    *,
    allow_mismatched: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Check headers, dtypes and sizes of what `from_pretrained` is about to load; no weight is read.

    Returns:
        The options for transformers. For a Hub id they name the commit whose files have been checked.
    """
    checkpoint, options = open_before_loading(source, contents.get("transformers_weights"), options)
    if checkpoint is None or (contents | options).get("quantization_config") is not None:
        return options
    for name, entry in checkpoint.tensors.items():
        require_float(checkpoint.folder / entry.file, name, entry)
    expected = _released_shapes(model_class, _config_for(model_class, contents, checkpoint), checkpoint)
    shapes = [(name, entry.shape, expected.get(our_name(name).key)) for name, entry in checkpoint.tensors.items()]
    mismatched = [(name, found, shape) for name, found, shape in shapes if shape not in (None, found)]
    if mismatched and not allow_mismatched:
        problems = problems_with(missing=(), unexpected=(), mismatched=mismatched)
        raise ValueError(f"{source} does not fit the model. {problems}.")
    return options


def _config_for(model_class: Any, fields: dict[str, Any], checkpoint: LocalCheckpoint) -> Any:
    """A configuration, unless it states far more layers or experts than a checkpoint has."""
    keys = [our_name(name).key for name in checkpoint.tensors]
    text_fields: Any = fields.get("text_config")
    for field, pattern in _COUNTS.items() if isinstance(text_fields, dict) else ():
        found = {match[1] for key in keys if (match := re.search(pattern, key))}
        stated = text_fields.get(field)
        # Without single experts there are those that transformers saves as one tensor a layer.
        if found and isinstance(stated, int) and stated > len(found) + MAX_MORE_LAYERS:
            raise ValueError(f"`text_config.{field}` is {stated:,}; the checkpoint's weights have {len(found)}.")
    try:
        config = model_class.config_class.from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(f"The configuration is none that transformers takes: {error}") from error
    check_layers(config.vision_config, keys)
    return config


def _released_shapes(model_class: Any, config: Any, checkpoint: LocalCheckpoint) -> dict[str, tuple[int, ...]]:
    """Released name to shape of a model's tensors, without making them."""
    shapes = expected_shapes(model_class, config)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(view.shape) for name, view in released_views(weights, checkpoint.tensors).items()}


def write_whole(model: Any, base: str | os.PathLike, target: str | os.PathLike, **hub_options: Any) -> WriteReport:
    """What `DeepSeekOCRForConditionalGeneration.write_deepseek_ocr` says."""
    folder = local_checkpoint(base, "base", **hub_options)
    present = open_local(folder).tensors
    views = _less_tied(released_views(weights_of(model), present), model.config, present)
    return write_weights(views, folder, target, whole=True)


def _less_tied(tensors: dict[str, Any], config: Any, present: Container[str]) -> dict[str, Any]:
    """The tensors of a model without its output layer's where that is its embeddings', stored once."""
    is_stored_once = config.tie_word_embeddings and _OUTPUT not in present
    return {name: tensor for name, tensor in tensors.items() if name != _OUTPUT or not is_stored_once}


def is_router(name: str) -> bool:
    """Whether a tensor is the weight of a router, which stays in float32, as transformers keeps it."""
    return name.endswith(".mlp.gate.weight")


def released_views(weights: Mapping[str, torch.Tensor], present: Container[str] = ()) -> dict[str, torch.Tensor]:
    """The model's tensors, or parts of them, under the released names less their `model.`.

    Args:
        weights: The model's tensors under its own names.
        present: Names in a checkpoint; experts that it has as one tensor, as transformers can save them, are one here.
    """
    views = {}
    for name, tensor in weights.items():
        key = next((key + name.removeprefix(prefix) for prefix, key in _OUR_PREFIXES if name.startswith(prefix)), name)
        layer, _, part = key.rpartition(".mlp.experts.")
        if not layer or any(spelling in present for spelling in (f"model.{key}", f"model.language_model.{key}")):
            views[key] = tensor
            continue
        for index, expert in enumerate(tensor):
            parts = _EXPERT_PARTS[part]
            for linear, view in zip(parts, expert.chunk(len(parts)), strict=True):
                views[f"{layer}.mlp.experts.{index}.{linear}.weight"] = view
    return views


# Configuration


def fields_of_config(contents: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `DeepSeekOCRConfig` that a checkpoint's `config.json` states, if transformers computes it."""
    if contents.get("model_type") == "deepseek_ocr_full":
        return contents
    text_config = contents.get("text_config")
    fields = {
        "vision_config": config_of_checkpoint(contents, "concat").to_dict(),
        "text_config": _text_fields(contents) if text_config is None else text_config,
    }
    return fields | ({"image_token_id": contents["image_token_id"]} if "image_token_id" in contents else {})


def _text_fields(contents: dict[str, Any]) -> dict[str, Any]:
    language = contents.get("language_config")
    if not isinstance(language, dict):
        raise ValueError(
            "The checkpoint's config.json has no `language_config` and no `text_config`: it is no whole DeepSeek-OCR."
        )
    for name, built_in in _BUILT_IN.items():
        if language.get(name, built_in) != built_in:
            raise ValueError(f"`language_config.{name}` is {language[name]!r}; only {built_in!r} can be computed.")
    # Unlimited-OCR has its window beside the language model.
    stated = {name: contents[name] for name in ("sliding_window",) if contents.get(name) is not None} | language
    fields = {name: stated[name] for name in _LANGUAGE_FIELDS if name in stated}
    rope = {"rope_type": "default", "rope_theta": float(language.get("rope_theta", 10000.0))}
    return fields | {"rope_parameters": rope}


def image_token_of(folder: Path) -> int | None:
    """Id of `<image>` in a folder's tokenizer; `None` where there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
    return next((token["id"] for token in added if token.get("content") == IMAGE_TOKEN), None)
