"""Weights to a folder and back, and what is said when they do not fit."""

import json

import pytest
import torch
from helpers import FEATURE_MODES, assert_same_weights, pixels, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel

from deepseek_ocr_vision import DeepSeekOCRVisionModel


def change_weights(folder, change) -> None:
    """Rewrite the weights of a saved model by a function from dictionary to dictionary."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_saved_model_loads_bit_for_bit(tmp_path, feature_mode, max_shard_size):
    """Pins the round trip, also sharded, by the class and by `AutoModel`."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).eval()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    for loaded in (DeepSeekOCRVisionModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is DeepSeekOCRVisionModel
        assert_same_weights(loaded, model)
        assert torch.equal(loaded(pixels()).last_hidden_state, model(pixels()).last_hidden_state)


def test_the_dtype_of_a_checkpoint_is_kept(tmp_path, tiny_model):
    """Pins `dtype="auto"`, and a dtype that is asked for."""
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert AutoModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_device_map_auto_places_the_model(tmp_path, tiny_model):
    """Pins accelerate's placement, which needs `_no_split_modules`."""
    tiny_model.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(loaded(pixels()).last_hidden_state, tiny_model(pixels()).last_hidden_state)


def test_the_prefix_of_the_released_checkpoint_is_taken_off(tmp_path, tiny_model):
    """Pins that keys under `model.`, as released, load as they are, language model and unused tensors left aside."""
    tiny_model.save_pretrained(tmp_path)
    extra = {
        "model.embed_tokens.weight": torch.zeros(4, 2),
        "model.layers.0.mlp.experts.3.up_proj.weight": torch.zeros(2, 2),
        "model.norm.weight": torch.zeros(2),
        "lm_head.weight": torch.zeros(4, 2),
        "model.image_newline": torch.zeros(2),
        "model.view_seperator": torch.zeros(2),
        "model.projector.layers.weight": torch.zeros(2, 2),
        "model.vision_model.embeddings.class_embedding": torch.zeros(32),
        "model.vision_model.embeddings.patch_embedding.weight": torch.zeros(32, 3, 14, 14),
    }
    change_weights(tmp_path, lambda weights: {f"model.{name}": value for name, value in weights.items()} | extra)
    assert_same_weights(AutoModel.from_pretrained(tmp_path), tiny_model)


def test_missing_weights_are_an_error_that_lists_ten(tmp_path, tiny_model):
    """Pins random weights under a warning, which is what transformers leaves a user with."""
    tiny_model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {n: v for n, v in weights.items() if not n.startswith("vision_model.t")})
    with pytest.raises(ValueError, match=r"24 tensors are missing: vision_model\.transformer.* and 14 more"):
        AutoModel.from_pretrained(tmp_path)


def test_weights_that_are_not_the_models_are_an_error(tmp_path, tiny_model):
    """Pins a renamed key: its weight would be drawn anew, and the loaded one dropped."""
    tiny_model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {n.replace("net_3", "net_4"): v for n, v in weights.items()})
    with pytest.raises(ValueError, match=r"missing: sam_model\.net_3\.weight; 1 tensors .*: sam_model\.net_4\.weight"):
        AutoModel.from_pretrained(tmp_path)


def test_a_wrong_shape_is_an_error_with_both_shapes(tmp_path, tiny_model):
    """Pins a checkpoint of another size under the same names."""
    tiny_model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights | {"sam_model.net_2.weight": torch.zeros(24, 16, 5, 5)})
    expected = r"sam_model\.net_2\.weight \(found \[24, 16, 5, 5\], expected \[24, 16, 3, 3\]\)"
    with pytest.raises(ValueError, match=expected):
        AutoModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_something_else_is_called_that(tmp_path, tiny_model):
    """Pins a foreign file under our config: what it looks like is said."""
    tiny_model.save_pretrained(tmp_path)
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**fields, image_size=28, patch_size=14))
    clip_weights = {f"vision_model.{name.removeprefix('vision_model.')}": v for name, v in clip.state_dict().items()}
    change_weights(tmp_path, lambda _: {name: value.contiguous() for name, value in clip_weights.items()})
    with pytest.raises(ValueError, match=r"not a DeepSeek-OCR vision checkpoint: its keys look like a CLIP model"):
        AutoModel.from_pretrained(tmp_path)


def test_an_empty_checkpoint_is_called_that(tmp_path, tiny_model):
    """Pins a file of a language model alone, all of whose keys are known and none of use."""
    tiny_model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda _: {"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"not a DeepSeek-OCR vision checkpoint.*language model"):
        AutoModel.from_pretrained(tmp_path)


def test_what_does_not_fit_can_be_allowed(tmp_path, tiny_model):
    """Pins the way round each error, for who knows better."""
    tiny_model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, feature_mode="projected", strict=False).config.hidden_size == 48
    _, info = AutoModel.from_pretrained(tmp_path, feature_mode="projected", output_loading_info=True)
    assert any("projector" in name for name in info["missing_keys"])
    change_weights(tmp_path, lambda weights: weights | {"sam_model.net_2.weight": torch.zeros(24, 16, 5, 5)})
    loaded = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.sam_model.net_2.weight.shape == (24, 16, 3, 3)


def test_a_checkpoint_of_a_richer_mode_loads_in_a_poorer_one(tmp_path):
    """Pins `feature_mode=` at loading: concat weights are all that residual needs."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, feature_mode="residual")
    assert loaded(pixels()).last_hidden_state.shape == (2, 4, 32)
    assert torch.equal(loaded.sam_model.net_3.weight, model.sam_model.net_3.weight)


def test_saving_to_a_file_is_an_error(tmp_path, tiny_model):
    """Pins a target that is a file: transformers logs that and saves nothing."""
    target = tmp_path / "model"
    target.write_text("mine")
    for saved in (tiny_model, tiny_model.config):
        with pytest.raises(NotADirectoryError, match=str(target)):
            saved.save_pretrained(target)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("feature_mode", FEATURE_MODES)
def test_a_new_model_is_the_same_from_its_class_and_from_an_empty_checkpoint(feature_mode):
    """Pins that every parameter is drawn by `_init_weights`, in one order, and none by a constructor alone."""
    config = tiny_config(feature_mode=feature_mode)
    torch.manual_seed(0)
    from_class = DeepSeekOCRVisionModel(config)
    torch.manual_seed(0)
    from_nothing = DeepSeekOCRVisionModel.from_pretrained(None, config=config, state_dict={})
    assert_same_weights(from_nothing, from_class)


def test_weights_are_drawn_as_the_stages_say():
    """Pins one `initializer_range` a stage, and that position tables are drawn as well."""
    stages = {
        "sam_config": tiny_config().sam_config.to_dict() | {"initializer_range": 0.5},
        "clip_config": tiny_config().clip_config.to_dict() | {"initializer_range": 0.01},
    }
    model = DeepSeekOCRVisionModel(tiny_config(**stages, feature_mode="projected"))
    for name in ("pos_embed", "blocks.0.attn.rel_pos_h", "blocks.1.mlp.lin1.weight", "net_3.weight"):
        assert model.sam_model.get_parameter(name).std().item() == pytest.approx(0.5, rel=0.2)
    for name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        assert model.vision_model.get_parameter(name).std().item() == pytest.approx(0.01, rel=0.5)
    assert model.projector.layers.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_a_model_can_be_built_on_the_meta_device():
    """Pins construction without memory, which large composites and accelerate rely on."""
    with torch.device("meta"):
        model = DeepSeekOCRVisionModel(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_saved_config_names_model_and_code(tmp_path, tiny_model):
    """Pins what the Auto classes read."""
    tiny_model.save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    assert contents["architectures"] == ["DeepSeekOCRVisionModel"]
    assert contents["auto_map"]["AutoModel"] == "modeling_deepseek_ocr_vision.DeepSeekOCRVisionModel"
    assert contents["hidden_size"] == 32


# Files


def test_files_that_are_cut_or_foreign_are_errors_that_name_them(tmp_path, tiny_model):
    """Pins the library's own message, which names neither the file nor what to do."""
    tiny_model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    sound = path.read_bytes()
    for contents, expected in (
        (sound[:-1], "is cut"),
        (b"<html>", "HTML"),
        (b"", "is empty"),
        (sound + b"x", "too long"),
    ):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"{path}.*{expected}"):
            AutoModel.from_pretrained(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, tiny_model):
    """Pins a path in an index, which transformers follows."""
    folder = tmp_path / "saved"
    tiny_model.save_pretrained(folder, max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    name = json.loads(index.read_text())["weight_map"]["sam_model.pos_embed"]
    (folder / name).rename(tmp_path / "outside.safetensors")
    index.write_text(index.read_text().replace(name, "../outside.safetensors"))
    with pytest.raises(ValueError, match="no safetensors file in the same folder; refused"):
        AutoModel.from_pretrained(folder)


def test_pickles_are_not_loaded(tmp_path, tiny_model):
    """Pins weights that can run code, where safetensors are missing."""
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(tmp_path)
