"""The configuration: what it holds, what it refuses, and how it travels."""

import json
import re

import numpy as np
import pytest
from helpers import EVERY_FEATURE_MODE, tiny_config
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig

from deepseek_ocr_vision import (
    PRESETS,
    DeepSeekOCRVisionClipConfig,
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionSamConfig,
)


def test_the_defaults_are_the_released_encoder():
    """Pins every constant of the architecture, so that a config without arguments fits the released weights."""
    config = DeepSeekOCRVisionConfig()
    sam, clip = config.sam_config, config.clip_config
    assert (sam.hidden_size, sam.num_hidden_layers, sam.num_attention_heads, sam.mlp_dim) == (768, 12, 12, 3072)
    assert (sam.patch_size, sam.window_size, sam.global_attn_indexes) == (16, 14, [2, 5, 8, 11])
    assert (sam.output_channels, sam.downsample_channels, sam.image_size) == (256, [512, 1024], 1024)
    assert (sam.hidden_act, sam.layer_norm_eps) == ("gelu", 1e-6)
    assert (clip.hidden_size, clip.intermediate_size, clip.num_hidden_layers) == (1024, 4096, 24)
    assert (clip.num_attention_heads, clip.grid_size) == (16, 16)
    assert (clip.hidden_act, clip.layer_norm_eps) == ("quick_gelu", 1e-5)
    assert (config.image_size, config.patch_size, config.num_channels, config.projection_dim) == (1024, 64, 3, 1280)
    assert (config.feature_mode, config.hidden_size) == ("residual", 1024)


@pytest.mark.parametrize(
    ("feature_mode", "width"), [("residual", 1024), ("concat", 2048), ("projected", 1280), ("sequence", 1280)]
)
def test_hidden_size_is_the_width_of_the_tokens(feature_mode, width):
    """Pins what composites build their projector from; it follows the mode, also when that is assigned later."""
    assert DeepSeekOCRVisionConfig(feature_mode=feature_mode).hidden_size == width
    config = DeepSeekOCRVisionConfig()
    config.feature_mode = feature_mode
    assert config.hidden_size == config.to_dict()["hidden_size"] == width


def test_image_size_follows_the_sam_stage_unless_it_is_given():
    """Pins a small stage in a config whose top level would otherwise still say 1024."""
    assert tiny_config().image_size == 128
    assert tiny_config(image_size=256).image_size == 256


SAM_FIELDS = tiny_config().sam_config.to_dict()
CLIP_FIELDS = tiny_config().clip_config.to_dict()
BAD_FIELDS = [
    ("feature_mode", {"feature_mode": "both"}),
    ("hidden_size", {"hidden_size": 33}),
    ("patch_size", {"patch_size": 16}),
    ("patch_size", {"patch_size": -64}),
    ("image_size", {"image_size": 100}),
    ("image_size", {"image_size": 0}),
    ("num_channels", {"num_channels": 0}),
    ("projection_dim", {"projection_dim": -1}),
    ("sam_config.num_attention_heads", {"sam_config": SAM_FIELDS | {"num_attention_heads": 3}}),
    ("sam_config.hidden_size", {"sam_config": SAM_FIELDS | {"hidden_size": -32}}),
    ("sam_config.window_size", {"sam_config": SAM_FIELDS | {"window_size": 0}}),
    ("sam_config.global_attn_indexes[0]", {"sam_config": SAM_FIELDS | {"global_attn_indexes": [2]}}),
    ("sam_config.downsample_channels", {"sam_config": SAM_FIELDS | {"downsample_channels": [24, 48]}}),
    ("sam_config.downsample_channels", {"sam_config": SAM_FIELDS | {"downsample_channels": [32]}}),
    ("sam_config.image_size", {"sam_config": SAM_FIELDS | {"image_size": 100}}),
    ("sam_config.hidden_act", {"sam_config": SAM_FIELDS | {"hidden_act": "gelo"}}),
    ("sam_config.layer_norm_eps", {"sam_config": SAM_FIELDS | {"layer_norm_eps": 0}}),
    ("sam_config.initializer_range", {"sam_config": SAM_FIELDS | {"initializer_range": float("nan")}}),
    ("clip_config.num_attention_heads", {"clip_config": CLIP_FIELDS | {"num_attention_heads": 5}}),
    ("clip_config.num_hidden_layers", {"clip_config": CLIP_FIELDS | {"num_hidden_layers": 0}}),
    ("clip_config.grid_size", {"clip_config": CLIP_FIELDS | {"grid_size": -2}}),
    ("model_type", {"model_type": "clip"}),
    ("model_type", {"sam_config": SAM_FIELDS | {"model_type": "sam"}}),
]
BAD_TYPES = [
    ("feature_mode", {"feature_mode": None}),
    ("projection_dim", {"projection_dim": 12.5}),
    ("sam_config.hidden_size", {"sam_config": SAM_FIELDS | {"hidden_size": "32"}}),
    ("sam_config.mlp_dim", {"sam_config": SAM_FIELDS | {"mlp_dim": True}}),
    ("sam_config.global_attn_indexes", {"sam_config": SAM_FIELDS | {"global_attn_indexes": 1}}),
    ("sam_config.downsample_channels[1]", {"sam_config": SAM_FIELDS | {"downsample_channels": [24, None]}}),
    ("sam_config.hidden_act", {"sam_config": SAM_FIELDS | {"hidden_act": ["gelu"]}}),
    ("clip_config.layer_norm_eps", {"clip_config": CLIP_FIELDS | {"layer_norm_eps": "1e-5"}}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_FIELDS)
def test_a_value_that_is_not_allowed_is_an_error_that_names_its_field(field, fields):
    """Pins validation when a config is built."""
    with pytest.raises(ValueError, match=re.escape(f"`{field}`")):
        tiny_config(**fields)


@pytest.mark.parametrize(("field", "fields"), BAD_TYPES)
def test_a_value_of_another_type_is_a_type_error_that_names_its_field(tmp_path, field, fields):
    """Pins a text or a list in a number's place, when a config is built and when one is loaded."""
    with pytest.raises(TypeError, match=re.escape(f"`{field}`")):
        tiny_config(**fields)
    contents = tiny_config().to_dict() | fields
    (tmp_path / "config.json").write_text(json.dumps(contents, default=str))
    with pytest.raises(TypeError, match=re.escape(f"`{field}`")):
        DeepSeekOCRVisionConfig.from_pretrained(tmp_path)


def test_numbers_of_numpy_s_become_numbers_of_python_s(tmp_path):
    """Pins a width computed with numpy, which JSON cannot hold."""
    config = tiny_config(projection_dim=np.int64(20), clip_config=CLIP_FIELDS | {"layer_norm_eps": np.float64(1e-5)})
    config.save_pretrained(tmp_path)
    assert DeepSeekOCRVisionConfig.from_pretrained(tmp_path).projection_dim == 20


# What a file says of the derived width is checked against the file's own mode, above.
@pytest.mark.parametrize(("field", "fields"), [bad for bad in BAD_FIELDS if bad[0] != "hidden_size"])
def test_a_file_with_a_value_that_is_not_allowed_is_an_error_too(tmp_path, field, fields):
    """Pins validation when a config is loaded; transformers only logs another `model_type`."""
    contents = tiny_config().to_dict() | fields
    (tmp_path / "config.json").write_text(json.dumps(contents, default=str))
    with pytest.raises(ValueError, match=re.escape(f"`{field}`")):
        DeepSeekOCRVisionConfig.from_pretrained(tmp_path)


def test_an_override_at_loading_is_validated_as_well(tmp_path):
    """Pins `from_pretrained(folder, feature_mode=...)`, which transformers applies after the constructor."""
    tiny_config().save_pretrained(tmp_path)
    assert DeepSeekOCRVisionConfig.from_pretrained(tmp_path, feature_mode="concat").hidden_size == 64
    with pytest.raises(ValueError, match="`feature_mode`"):
        DeepSeekOCRVisionConfig.from_pretrained(tmp_path, feature_mode="both")


@pytest.mark.parametrize("contents", ["[1, 2]", '"text"', '{"model_type": "deepseek_ocr_vi', ""])
def test_a_config_file_that_holds_no_object_is_an_error_that_names_it(tmp_path, contents):
    """Pins a truncated file and one of another kind, which fail obscurely further down."""
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises((OSError, TypeError, ValueError), match=r"config\.json"):
        DeepSeekOCRVisionConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("sam_config", [3, "sam", DeepSeekOCRVisionClipConfig()])
def test_a_stage_of_the_wrong_type_is_an_error(sam_config):
    """Pins stages passed in each other's place."""
    with pytest.raises(TypeError, match="`sam_config`"):
        DeepSeekOCRVisionConfig(sam_config=sam_config)


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_a_saved_config_loads_as_it_was(tmp_path, feature_mode):
    """Pins the JSON round trip of every field, by the class and by `AutoConfig`."""
    config = tiny_config(feature_mode=feature_mode, projection_dim=20, image_size=256)
    config.save_pretrained(tmp_path)
    for loaded in (DeepSeekOCRVisionConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is DeepSeekOCRVisionConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert DeepSeekOCRVisionConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).image_size == 256


def test_stages_are_taken_as_objects_and_as_dictionaries():
    """Pins both forms, and that a dictionary need not hold every field."""
    from_objects = DeepSeekOCRVisionConfig(
        sam_config=DeepSeekOCRVisionSamConfig(window_size=7), clip_config=DeepSeekOCRVisionClipConfig(grid_size=8)
    )
    from_dictionaries = DeepSeekOCRVisionConfig(sam_config={"window_size": 7}, clip_config={"grid_size": 8})
    assert from_objects.to_dict() == from_dictionaries.to_dict()


def test_a_stage_can_be_saved_and_loaded_alone_and_out_of_the_whole(tmp_path):
    """Pins that a stage's config is one in its own right."""
    tiny_config().sam_config.save_pretrained(tmp_path / "sam")
    tiny_config().save_pretrained(tmp_path / "whole")
    for folder in ("sam", "whole"):
        loaded = DeepSeekOCRVisionSamConfig.from_pretrained(tmp_path / folder)
        assert (loaded.hidden_size, loaded.window_size) == (32, 3)


def test_the_config_of_a_composite_holds_ours_and_gives_it_back(tmp_path):
    """Pins `LlavaConfig` around our tower, in memory and through its file."""
    text_config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    LlavaConfig(vision_config=tiny_config(feature_mode="concat"), text_config=text_config).save_pretrained(tmp_path)
    loaded = LlavaConfig.from_pretrained(tmp_path)
    assert type(loaded.vision_config) is DeepSeekOCRVisionConfig
    assert loaded.vision_config.hidden_size == 64
    assert DeepSeekOCRVisionConfig.from_pretrained(tmp_path).feature_mode == "concat"


def test_the_config_of_another_model_is_refused(tmp_path):
    """Pins a CLIP folder given by mistake; transformers goes on with it, under a message in the log."""
    CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="clip_vision_model"):
        DeepSeekOCRVisionConfig.from_pretrained(tmp_path)


def test_hidden_size_cannot_be_assigned():
    """Pins that a derived field does not drift from what it is derived from."""
    with pytest.raises(NotImplementedError, match="feature_mode"):
        DeepSeekOCRVisionConfig().hidden_size = 5


def test_presets_name_a_feature_mode_each():
    """Pins the pairs of preprocessing and features that people have trained on."""
    assert {name: preset.feature_mode for name, preset in PRESETS.items()} == {
        "deepseek-ocr-encoder": "residual",
        "deepseek-ocr": "concat",
    }


def test_tiny_is_small_and_takes_fields_and_fields_of_stages():
    """Pins first steps: a stage's dictionary that names one field, and leaves the others at the full size."""
    config = DeepSeekOCRVisionConfig.tiny(clip_config={"num_hidden_layers": 3}, feature_mode="projected")
    assert (config.image_size, config.hidden_size, config.projection_dim) == (128, 48, 48)
    assert (config.clip_config.num_hidden_layers, config.clip_config.hidden_size) == (3, 32)
    assert DeepSeekOCRVisionConfig.tiny(sam_config=config.sam_config).sam_config.hidden_size == 32
