"""Weights in: the encoder out of a whole checkpoint on this machine, all of it or an error."""

import json
import shutil

import pytest
import torch
from helpers import (
    EVERY_FEATURE_MODE,
    TOLERANCE,
    assert_same_weights,
    golden_pixels,
    golden_weight,
    needs_golden,
    pixels,
    relative_error,
    released_tensors,
    run_python,
    tiny_config,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from deepseek_ocr_vision import (
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionImageProcessor,
    DeepSeekOCRVisionModel,
    DeepSeekOCRVisionProcessor,
    load_encoder,
)
from deepseek_ocr_vision.modeling import base_deepseek_ocr_vision as base
from deepseek_ocr_vision.modeling import sam_deepseek_ocr_vision as sam
from deepseek_ocr_vision.weights import reading


@pytest.fixture
def model() -> DeepSeekOCRVisionModel:
    """A tiny model with the parameters of all modes that give a token for each square."""
    return DeepSeekOCRVisionModel(tiny_config(feature_mode="projected")).eval()


@pytest.fixture
def checkpoint(tmp_path, model):
    """A released checkpoint around it, in three files."""
    return write_checkpoint(tmp_path / "released", released_tensors(model), model.config, num_shards=3)


def change(checkpoint, change_tensors) -> None:
    """Rewrite a checkpoint's files by a function from dictionary to dictionary."""
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file(change_tensors(tensors), checkpoint / "model.safetensors")


def in_mode(model: DeepSeekOCRVisionModel, feature_mode: str) -> DeepSeekOCRVisionModel:
    """The same weights in another mode."""
    poorer = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).eval()
    poorer.load_state_dict({key: model.state_dict()[key] for key in poorer.state_dict()})
    return poorer


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_a_mode_gets_the_weights_that_it_uses(tmp_path, feature_mode):
    """Pins every weight in its place, for each mode, out of files that hold a language model as well."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="sequence"))
    checkpoint = write_checkpoint(tmp_path, released_tensors(model), model.config, num_shards=3)
    loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint, feature_mode=feature_mode)
    assert_same_weights(loaded, in_mode(model, feature_mode))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_folder_of_one_file_and_the_file_itself_load_as_many_do(checkpoint, model):
    """Pins the three forms of a local source."""
    change(checkpoint, lambda tensors: tensors)
    for source in (checkpoint, str(checkpoint), checkpoint / "model.safetensors"):
        assert_same_weights(DeepSeekOCRVisionModel.from_deepseek_ocr(source, feature_mode="projected"), model)


def test_a_preset_decides_the_mode_of_the_model_and_the_geometry_of_the_processor(checkpoint):
    """Pins that the two go together, also where the encoder's page is another."""
    for preset, feature_mode in (("deepseek-ocr-encoder", "residual"), ("deepseek-ocr", "concat")):
        loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint, preset=preset)
        processor = DeepSeekOCRVisionProcessor.from_deepseek_ocr(checkpoint, preset=preset)
        assert loaded.config.feature_mode == feature_mode
        assert processor.image_processor.preset == preset
        assert processor.image_processor.size == {"height": 128, "width": 128}
    processor = DeepSeekOCRVisionImageProcessor.from_deepseek_ocr(checkpoint, size=192, resize_backend="pil")
    assert (processor.size["width"], processor.resize_backend) == (192, "pil")
    processor = DeepSeekOCRVisionImageProcessor.from_deepseek_ocr(checkpoint, preset="deepseek-ocr", mode="gundam")
    assert (processor.size["width"], processor.tile_size) == (1024, 640)
    (checkpoint / "config.json").unlink()
    assert DeepSeekOCRVisionImageProcessor.from_deepseek_ocr(checkpoint).size["width"] == 1024
    with pytest.raises(ValueError, match="`preset` is 'clip'"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint, preset="clip")
    with pytest.raises(ValueError, match="`preset` is 'clip'"):
        DeepSeekOCRVisionProcessor.from_deepseek_ocr(checkpoint, preset="clip")


def test_a_loaded_model_encodes_saves_and_loads(checkpoint, tmp_path):
    """Pins the day after: no trace of the source is left that a later step would stumble over."""
    loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)
    assert loaded.config.name_or_path == ""
    assert loaded.encode(torch.rand(3, 50, 70))[0].shape == (4, 32)
    loaded.save_pretrained(tmp_path / "saved")
    assert_same_weights(DeepSeekOCRVisionModel.from_pretrained(tmp_path / "saved"), loaded)


def test_the_dtype_is_the_stored_one_or_the_one_that_is_asked_for(checkpoint, model):
    """Pins 0.8 GB: the released weights are bfloat16 and stay so unless somebody wants more."""
    change(checkpoint, lambda tensors: {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()})
    load = DeepSeekOCRVisionModel.from_deepseek_ocr
    assert {parameter.dtype for parameter in load(checkpoint, dtype="auto").parameters()} == {torch.bfloat16}
    for dtype in ("float32", torch.float32):
        loaded = load(checkpoint, feature_mode="projected", dtype=dtype)
        expected = {key: tensor.bfloat16().float() for key, tensor in model.state_dict().items()}
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    with pytest.raises(ValueError, match="`dtype` is 'int8'"):
        load(checkpoint, dtype="int8")


@pytest.mark.parametrize("has_products", [True, False])
def test_nobody_waits_for_a_dtype_that_the_processor_emulates(checkpoint, tmp_path, monkeypatch, has_products):
    """Pins 100 s for a page in place of 9, of which a first user was not told; who asks for it is."""
    change(checkpoint, lambda tensors: {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()})
    monkeypatch.setattr(base, "EMULATED", [] if has_products else [torch.bfloat16])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    warnings = []
    for module in (reading, sam):
        monkeypatch.setattr(module.logger, "warning", warnings.append)
        monkeypatch.setattr(module.logger, "warning_once", warnings.append)
    asked = DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint, dtype="auto")
    asked.save_pretrained(tmp_path / "encoder")
    expected = torch.bfloat16 if has_products else torch.float32
    for model in (DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint), load_encoder(tmp_path / "encoder")[0]):
        assert model.dtype == expected
        model(torch.rand(1, 3, 64, 64))
    assert asked.dtype == load_encoder(tmp_path / "encoder", dtype="auto")[0].dtype == torch.bfloat16
    assert len(warnings) == (0 if has_products else 2)
    asked(torch.rand(1, 3, 64, 64))
    assert ("model.float()" in str(warnings[-1:])) is not has_products


def test_a_mixture_of_dtypes_is_loaded_in_one_that_holds_them_all(checkpoint):
    """Pins norms kept in float32 among half-precision weights: nothing is rounded unasked."""
    change(
        checkpoint,
        lambda tensors: {n: t.bfloat16() if t.ndim > 1 and t.is_floating_point() else t for n, t in tensors.items()},
    )
    loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_keyword_arguments_go_on_to_from_pretrained(checkpoint):
    """Pins what users of transformers expect to work here too."""
    load = DeepSeekOCRVisionModel.from_deepseek_ocr
    assert load(checkpoint, attn_implementation="eager").config._attn_implementation == "eager"
    assert load(checkpoint, device_map="cpu").device.type == "cpu"


def test_sizes_can_be_stated_where_the_checkpoint_does_not(checkpoint, model):
    """Pins DeepSeek's own configuration, which leaves the sizes to its code."""
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "deepseek_vl_v2"}))
    with pytest.raises(ValueError, match=r"have another shape: .*\(found \[.*\], expected \[.*\]\)|are missing"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)
    loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint, config=tiny_config(feature_mode="projected"))
    assert_same_weights(loaded, model)


def test_an_encoder_saved_by_us_and_one_inside_a_llava_are_read_as_well(tmp_path, model):
    """Pins other places where the same weights are found."""
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "saved", feature_mode="projected"), model)
    poorer = in_mode(model, "concat")
    tensors = {f"model.vision_tower.{key}": tensor for key, tensor in poorer.state_dict().items()}
    tensors["model.multi_modal_projector.linear_1.weight"] = torch.zeros(4, 4)
    tensors["model.language_model.layers.0.weight"] = torch.zeros(4, 4)
    folder = write_checkpoint(tmp_path / "llava", tensors, model.config)
    (folder / "config.json").write_text(json.dumps({"vision_config": poorer.config.to_dict()}))
    assert_same_weights(DeepSeekOCRVisionModel.from_deepseek_ocr(folder, feature_mode="concat"), poorer)


# What does not fit


def test_missing_tensors_are_an_error_that_lists_ten(checkpoint):
    """Pins weights drawn at random in their place."""
    change(checkpoint, lambda tensors: {n: t for n, t in tensors.items() if ".blocks.1." not in n})
    with pytest.raises(ValueError, match=r"14 tensors are missing: sam_model\.blocks\.1\..* and 4 more"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


def test_unknown_tensors_are_an_error(checkpoint):
    """Pins a block too many, which would mean that the sizes are others."""
    change(checkpoint, lambda tensors: tensors | {"model.sam_model.blocks.2.norm1.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"1 tensors are not of this model: model\.sam_model\.blocks\.2\.norm1"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


def test_another_shape_is_an_error_with_both(checkpoint):
    """Pins a tensor of another size under its name."""
    change(checkpoint, lambda tensors: tensors | {"model.sam_model.net_2.weight": torch.zeros(24, 16, 5, 5)})
    with pytest.raises(ValueError, match=r"net_2\.weight \(found \[24, 16, 5, 5\], expected \[24, 16, 3, 3\]\)"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_an_error_with_its_name(checkpoint, value):
    """Pins a checkpoint of a run that diverged."""

    def damage(tensors):
        tensors["model.sam_model.neck.1.bias"][3] = value
        return tensors

    change(checkpoint, damage)
    with pytest.raises(ValueError, match=r"model\.sam_model\.neck\.1\.bias holds NaN or infinity"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


def test_a_quantised_weight_is_an_error_with_its_dtype(checkpoint):
    """Pins integers taken for weights."""
    name = "model.sam_model.net_2.weight"
    change(checkpoint, lambda tensors: tensors | {name: torch.zeros(24, 16, 3, 3, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"net_2\.weight has dtype I8"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


def test_one_weight_under_two_names_is_an_error(checkpoint):
    """Pins a merged file of which either could be meant."""
    change(checkpoint, lambda tensors: tensors | {"sam_model.pos_embed": torch.zeros(1, 8, 8, 32)})
    with pytest.raises(ValueError, match=r"has sam_model\.pos_embed twice"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


def test_a_foreign_checkpoint_is_called_what_it_looks_like(tmp_path):
    """Pins CLIP's own weights, half of whose names are ours; and a language model."""
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**fields, image_size=28, patch_size=14)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"not a DeepSeek-OCR vision checkpoint: its keys look like a CLIP model"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "clip")
    save_file({"model.layers.0.mlp.weight": torch.zeros(2)}, tmp_path / "llama.safetensors")
    with pytest.raises(ValueError, match=r"not a DeepSeek-OCR vision checkpoint: its keys look like a language model"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "llama.safetensors")


# Files and folders


def test_a_missing_shard_is_an_error_that_names_it(checkpoint):
    """Pins a download that left one out."""
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors is missing"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


def test_an_index_that_is_cut_or_wrong_is_an_error_that_names_it(checkpoint):
    """Pins an index that does not describe the files beside it."""
    path = checkpoint / "model.safetensors.index.json"
    sound = json.loads(path.read_text())
    for contents in ("", "[]", "{}", path.read_text()[:100], json.dumps({"weight_map": ["a"]})):
        path.write_text(contents)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)
    sound["weight_map"]["model.sam_model.pos_embed"] = "model-00001-of-00003.safetensors"
    sound["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(sound))
    with pytest.raises(ValueError, match=r"corrupt: it looks for"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "{folder}/outside.safetensors", "sub/x.safetensors", "..", 3]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, checkpoint, place):
    """Pins a path in an index, which transformers follows."""
    place = place.format(folder=tmp_path) if isinstance(place, str) else place
    shutil.copy(checkpoint / "model-00002-of-00003.safetensors", tmp_path / "outside.safetensors")
    path = checkpoint / "model.safetensors.index.json"
    sound = json.loads(path.read_text())
    sound["weight_map"] = {
        name: place if file.startswith("model-00002") else file for name, file in sound["weight_map"].items()
    }
    path.write_text(json.dumps(sound))
    with pytest.raises(ValueError, match="no safetensors file in the same folder; refused"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran code')",)


def test_pickles_are_refused_and_not_run(tmp_path):
    """Pins the one format that can do harm by being opened, under two names."""
    torch.save({"weight": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only as pickles \(pytorch_model\.bin\)"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors.*pickles can run code"):
        DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path)


def test_what_is_not_there_is_an_error_before_any_connection(tmp_path):
    """Pins a typing mistake in a path, which the Hub would be asked for, and names that no repository can have."""
    load = DeepSeekOCRVisionModel.from_deepseek_ocr
    for source in (tmp_path / "nowhere", "./nowhere", "nowhere", "a/b/c", "~/x", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load(source)
    for source in ("a/..", "a--b/c", "a/b\n", "../x"):
        with pytest.raises((ValueError, FileNotFoundError)):
            load(source)
    for source in (None, 3):
        with pytest.raises(TypeError, match="`source`"):
            load(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        load(tmp_path / "empty")


def test_a_configuration_that_is_cut_is_an_error_that_names_it(checkpoint):
    """Pins a guess about the sizes where the file that states them is damaged."""
    for contents in ('{"vision_config"', "[1]"):
        (checkpoint / "config.json").write_text(contents)
        with pytest.raises(ValueError, match=r"config\.json"):
            DeepSeekOCRVisionModel.from_deepseek_ocr(checkpoint)


# Other implementations, other sizes


@pytest.mark.parametrize("save_original_format", [True, False])
def test_what_unlimited_ocr_saves_gives_the_tokens_that_it_computes(tmp_path, save_original_format):
    """Pins transformers' own names, query, key and value apart, and its released ones."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="this transformers has no Unlimited-OCR")
    from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

    sam, clip = tiny_config().sam_config.to_dict(), tiny_config().clip_config.to_dict()
    sam, clip = ({k: v for k, v in part.items() if k != "model_type"} for part in (sam, clip))
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 200, "n_routed_experts": 4, "moe_intermediate_size": 16}
    encoder = {name: clip[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    encoder |= {"num_attention_heads": clip["num_attention_heads"], "image_size": 28, "patch_size": 14}
    vision = {"sam_config": sam, "encoder_config": encoder}
    composite = UnlimitedOcrForConditionalGeneration(
        UnlimitedOcrConfig(vision_config=vision, text_config=text, image_token_id=199)
    ).eval()
    composite.save_pretrained(tmp_path, save_original_format=save_original_format)
    loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path, preset="deepseek-ocr")
    expected = composite.model.vision_tower(pixels()).last_hidden_state
    assert relative_error(loaded(pixels()).last_hidden_state, expected) < TOLERANCE[torch.float32]


@needs_golden
def test_a_released_checkpoint_of_full_size_gives_the_golden_features(tmp_path, golden, golden_weights):
    """Pins the whole way, with nothing that states the sizes: files in the released layout in, golden numbers out."""
    tensors = {f"model.{key}": tensor for key, tensor in golden_weights.items()}
    tensors["model.projector.layers.weight"] = golden_weight("projector.layers.weight", (1280, 2048))
    tensors["model.projector.layers.bias"] = golden_weight("projector.layers.bias", (1280,))
    tensors |= {f"model.{name}": torch.zeros(1280) for name in ("image_newline", "view_seperator")}
    write_checkpoint(tmp_path, tensors, DeepSeekOCRVisionConfig(), num_shards=2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_vl_v2", "vision_config": {"width": {}}}))
    del tensors
    for preset, name in (("deepseek-ocr-encoder", "residual_512"), ("deepseek-ocr", "clip_512")):
        loaded = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path, preset=preset)
        with torch.no_grad():
            tokens = loaded(golden_pixels(512)).last_hidden_state[0]
        expected = golden[name] if name == "residual_512" else torch.cat([golden[name][1:], golden["sam_512"]], dim=-1)
        assert relative_error(tokens, expected) < TOLERANCE[torch.float32]


def test_memory_is_that_of_the_vision_weights_whatever_the_size_of_the_checkpoint(tmp_path):
    """Pins a reader that loads or maps the language model: here it is eight times the encoder."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
    fields = {"sam_config": tiny_config().sam_config.to_dict() | {"downsample_channels": [24, 512]}}
    config = tiny_config(**fields, clip_config=sizes | {"grid_size": 2}, feature_mode="residual")
    with torch.device("meta"):
        model = DeepSeekOCRVisionModel(config)
    tensors = {f"model.{key}": torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}
    vision_bytes = sum(tensor.nbytes for tensor in tensors.values())
    tensors |= {f"model.layers.{index}.mlp.weight": torch.zeros(16, 2_000_000) for index in range(8)}
    assert sum(tensor.nbytes for tensor in tensors.values()) > 8 * vision_bytes > 800_000_000
    write_checkpoint(tmp_path, tensors, config, num_shards=2)
    output = run_python(f"""
        import gc, resource
        from deepseek_ocr_vision import DeepSeekOCRVisionModel
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = DeepSeekOCRVisionModel.from_deepseek_ocr({str(tmp_path)!r})
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """)
    assert int(output) < vision_bytes + 50_000_000
