"""The whole DeepSeek-OCR in and out: every tensor accounted for, and nothing lost on a round trip."""

import json

import pytest
import torch
from helpers import assert_same_weights, run_python
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    UnlimitedOcrForConditionalGeneration,
)
from whole_model import (
    IMAGE_TOKEN_ID,
    released_whole_tensors,
    tiny_whole_config,
    tiny_whole_model,
    unlimited_config,
    write_released,
)

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.composites import (
    DeepSeekOCRConfig,
    DeepSeekOCRForConditionalGeneration,
    DeepSeekOCRProcessor,
)


PATCH_EMBEDDING = "model.vision_model.embeddings.patch_embedding.weight"


@pytest.fixture
def model():
    return tiny_whole_model()


@pytest.fixture
def released(tmp_path, model):
    """A released checkpoint around it, in three files."""
    return write_released(tmp_path / "released", model)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def change(released, change_tensors) -> None:
    """Rewrite a checkpoint as one file by a function from dictionary to dictionary."""
    tensors = change_tensors(tensors_of(released))
    for path in (*released.glob("*.safetensors"), released / "model.safetensors.index.json"):
        path.unlink()
    save_file(tensors, released / "model.safetensors", metadata={"format": "pt"})


def test_a_released_checkpoint_is_loaded_whole(released, model):
    """Pins names, experts and configuration: every tensor arrives, bit for bit, in several shards."""
    loaded = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released)
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config.image_token_id == IMAGE_TOKEN_ID  # from the tokenizer
    assert loaded.config.text_config.to_dict().items() >= {"layer_types": ["full_attention"] * 3}.items()


def test_weights_stay_in_the_dtype_of_the_checkpoint_but_for_the_routers(released):
    """Pins bfloat16 in, and the routers that transformers keeps in float32."""
    change(released, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    loaded = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released, dtype="auto")
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    routers = {name for name in dtypes if name.endswith("mlp.gate.weight")}
    assert len(routers) == 2
    assert all(dtype == (torch.float32 if name in routers else torch.bfloat16) for name, dtype in dtypes.items())
    assert loaded.config.dtype == torch.bfloat16
    loaded = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released, dtype="float32")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change_tensors", "message"),
    [
        (lambda tensors: {n: t for n, t in tensors.items() if "experts.3.up_proj" not in n}, "2 tensors are missing"),
        (lambda tensors: tensors | {"model.layers.3.mlp.gate.weight": torch.zeros(4, 48)}, "not of this model"),
        (lambda tensors: tensors | {"lm_head.weight": torch.zeros(7, 48)}, r"found \[7, 48\], expected \[261, 48\]"),
        (lambda tensors: tensors | {"model.norm.weight": torch.full((48,), torch.nan)}, "NaN or infinity"),
        (lambda tensors: tensors | {"model.language_model.norm.weight": torch.ones(48)}, "norm.weight twice"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(released, change_tensors, message):
    """Pins the account: not one weight may be newly initialised or left over."""
    change(released, change_tensors)
    with pytest.raises(ValueError, match=message):
        DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released)


@pytest.mark.parametrize(
    ("field", "value"), [("use_mla", True), ("norm_topk_prob", True), ("rope_scaling", {"type": "yarn"})]
)
def test_a_language_model_that_transformers_does_not_compute_is_refused(released, field, value):
    """Pins that a configuration which asks for something else is not read over."""
    contents = json.loads((released / "config.json").read_text())
    contents["language_config"][field] = value
    (released / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=f"language_config.{field}"):
        DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released)


def test_an_image_token_outside_of_the_vocabulary_is_refused(released):
    """Pins a checkpoint whose tokenizer is not beside it: the released id is not one of a small vocabulary."""
    (released / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="`image_token_id` is 128815"):
        DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released)
    loaded = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released, image_token_id=5)
    assert loaded.config.image_token_id == 5


def test_a_changed_byte_is_found_by_the_checksums(released):
    """Pins that checksums are compared where there are some."""
    from deepseek_ocr_vision.saving.checksums import write_checksums

    write_checksums(released)
    DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released)
    path = next(released.glob("*.safetensors"))
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=path.name):
        DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released)


def test_files_that_were_not_fetched_from_the_hub_are_no_reason_to_refuse_it(tmp_path, released, model):
    """Pins a repository with checksums, of its code too: of that nothing is fetched."""
    from deepseek_ocr_vision.saving.checksums import write_checksums

    (released / "modeling_deepseekocr.py").write_text("...")
    write_checksums(released)
    (released / "modeling_deepseekocr.py").unlink()
    repository = tmp_path / "cache" / "models--someone--reader"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    released.rename(repository / "snapshots" / ("0" * 40))
    loaded = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr("someone/reader", cache_dir=tmp_path / "cache")
    assert_same_weights(loaded, model)


def test_an_output_layer_that_is_the_embeddings_is_stored_once(tmp_path):
    """Pins "1 tensors are missing: lm_head.weight" of what the same class had saved."""
    model = tiny_whole_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "saved")
    loaded = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_weights(loaded, model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.write_deepseek_ocr(tmp_path / "saved", tmp_path / "written")
    assert_same_weights(DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(tmp_path / "written"), model)


def test_what_transformers_saves_of_unlimited_ocr_is_loaded(tmp_path, model):
    """Pins the other layout, with its own names of configuration fields and its window of attention."""
    theirs = UnlimitedOcrForConditionalGeneration(unlimited_config(model.config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(tmp_path / "theirs")
    inputs = inputs_of(model)
    with torch.no_grad():
        expected, actual = theirs(**inputs).logits, loaded(**inputs).logits
    assert torch.allclose(actual, expected, atol=1e-5)
    assert set(loaded.config.text_config.layer_types) == {"reference_sliding_attention"}


def test_save_pretrained_writes_the_released_names_and_loads_again(tmp_path, model):
    """Pins the renamings: what transformers saves are the released tensors, bit for bit."""
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    released = released_whole_tensors(model)
    released.pop(PATCH_EMBEDDING)
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in saved)
    assert_same_weights(DeepSeekOCRForConditionalGeneration.from_pretrained(tmp_path / "saved"), model)
    assert_same_weights(DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(tmp_path / "saved"), model)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert type(loaded) is DeepSeekOCRForConditionalGeneration
    assert_same_weights(loaded, model)


def test_processor_and_model_load_by_the_auto_classes_in_a_fresh_process(tmp_path, released, model):
    """Pins registration on import of the package alone."""
    model.save_pretrained(tmp_path / "saved")
    DeepSeekOCRProcessor.from_deepseek_ocr(released, mode="tiny").save_pretrained(tmp_path / "saved")
    output = run_python(f"""
        import deepseek_ocr_vision
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "saved")!r})
        processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r})
        print(type(model).__name__, type(processor).__name__, processor.image_processor.mode)
    """)
    assert output.split() == ["DeepSeekOCRForConditionalGeneration", "DeepSeekOCRProcessor", "tiny"]


def test_a_checkpoint_of_another_kind_is_refused_by_from_pretrained(tmp_path, released, model):
    """Pins the 605 newly initialised tensors that transformers gives a released folder, with only a warning."""
    with pytest.raises(ValueError, match="from_deepseek_ocr"):
        DeepSeekOCRForConditionalGeneration.from_pretrained(released)
    with pytest.raises(ValueError, match="'deepseek_vl_v2'"):
        DeepSeekOCRForConditionalGeneration.from_pretrained(released)
    model.model.vision_tower.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="is a checkpoint of the kind"):
        DeepSeekOCRForConditionalGeneration.from_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no whole DeepSeek-OCR"):
        DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(tmp_path / "encoder")
    CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip"):
        DeepSeekOCRForConditionalGeneration.from_pretrained(tmp_path / "clip")


def test_the_encoder_loads_out_of_a_whole_model(tmp_path, model):
    """Pins that the encoder of a whole model is its own and not newly initialised, or an error that says how."""
    model.save_pretrained(tmp_path / "saved")
    encoder = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "saved", feature_mode="concat")
    assert_same_weights(encoder, model.model.vision_tower)
    with pytest.raises(ValueError, match=r"a whole checkpoint .* use `DeepSeekOCRVisionModel\.from_deepseek_ocr`"):
        DeepSeekOCRVisionModel.from_pretrained(tmp_path / "saved")


def test_from_pretrained_refuses_missing_weights(tmp_path, model):
    """Pins that a saved folder which lost a tensor is not completed at random."""
    model.save_pretrained(tmp_path / "saved")
    tensors = tensors_of(tmp_path / "saved")
    tensors.pop("model.image_newline")
    save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="image_newline"):
        DeepSeekOCRForConditionalGeneration.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("way", ["from_pretrained", "from_deepseek_ocr"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**6, "`text_config.num_hidden_layers` is 1,000,000; the checkpoint's weights have 3"),
        ("n_routed_experts", 10**9, "`text_config.n_routed_experts` is 1,000,000,000"),
        ("intermediate_size", 50_000_000, r"expected \[50000000, 48\]"),
        ("hidden_size", 2**62, "sizes are beyond"),
    ],
)
def test_sizes_that_do_not_match_the_files_are_refused_at_once(tmp_path, model, way, field, value, message):
    """Pins numbers in a configuration that were allocated, or built layer by layer, before shapes were compared."""
    model.save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text())
    contents["text_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message):
        getattr(DeepSeekOCRForConditionalGeneration, way)(tmp_path)


def test_what_is_saved_of_a_whole_model_is_checked_as_an_encoder_is(tmp_path, model):
    """Pins an index that leads out of the folder, a file that is cut, and integers that are taken for weights."""
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    index, shard = (
        tmp_path / "saved" / "model.safetensors.index.json",
        next((tmp_path / "saved").glob("*.safetensors")),
    )
    sound, contents = index.read_text(), shard.read_bytes()
    index.write_text(sound.replace(shard.name, f"../{shard.name}"))
    shard.rename(tmp_path / shard.name)
    with pytest.raises(ValueError, match="no safetensors file in the same folder; refused"):
        DeepSeekOCRForConditionalGeneration.from_pretrained(tmp_path / "saved")
    index.write_text(sound)
    for damaged, message in ((contents[:-1], "is cut"), (contents.replace(b'"F32"', b'"I32"'), "has dtype I32")):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard.name}.* {message}"):
            AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")


def test_in_one_step_out_and_in_again_is_exact(tmp_path, released):
    """Pins the round trip after training: everything trained is in the released layout, and transformers' own class
    computes the same from it.
    """
    model = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = inputs_of(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    report = model.eval().write_deepseek_ocr(released, tmp_path / "written")
    assert report.kept == [PATCH_EMBEDDING]
    assert not report.rounded
    before, after = tensors_of(released), tensors_of(tmp_path / "written")
    assert torch.equal(after[PATCH_EMBEDDING], before[PATCH_EMBEDDING])
    expected = released_whole_tensors(model) | {PATCH_EMBEDDING: before[PATCH_EMBEDDING]}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert all(not torch.equal(after[name], before[name]) for name in ("lm_head.weight", "model.image_newline"))
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "written" / name).read_bytes() == (released / name).read_bytes()
    assert_same_weights(DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(tmp_path / "written"), model)
    theirs = UnlimitedOcrForConditionalGeneration.from_pretrained(
        tmp_path / "written", config=unlimited_config(model.config)
    )
    with torch.no_grad():
        assert torch.allclose(theirs(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_weights_are_rounded_to_the_bases_dtype_and_the_report_says_so(tmp_path, released, model):
    """Pins float32 training of a bfloat16 checkpoint."""
    change(released, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    report = model.write_deepseek_ocr(released, tmp_path / "written")
    assert "lm_head.weight" in report.rounded
    written = tensors_of(tmp_path / "written")
    assert torch.equal(written["lm_head.weight"], model.lm_head.weight.bfloat16())


def test_merged_lora_is_written_back_and_unmerged_is_refused(tmp_path, released):
    """Pins adapters: a checkpoint without what they learnt would be written."""
    peft = pytest.importorskip("peft")
    model = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr(released)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["self_attn.q_proj", "attn.qkv"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.write_deepseek_ocr(released, tmp_path / "written")
    merged = adapted.merge_and_unload()
    merged.write_deepseek_ocr(released, tmp_path / "written")
    before, after = tensors_of(released), tensors_of(tmp_path / "written")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == 3 + 2
    assert all("q_proj" in name or "qkv" in name for name in changed)


def test_only_the_whole_model_fits_a_base(tmp_path, released):
    """Pins a base of another size, and a base without a language model."""
    model = tiny_whole_model(text_config={"num_hidden_layers": 4})
    with pytest.raises(ValueError, match="tensors are missing"):
        model.write_deepseek_ocr(released, tmp_path / "written")
    model = tiny_whole_model(text_config={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="not of this model"):
        model.write_deepseek_ocr(released, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_a_config_that_cannot_be_meant_is_refused():
    """Pins the checks of the whole model's own fields."""
    with pytest.raises(ValueError, match="feature_mode"):
        DeepSeekOCRConfig(vision_config={"feature_mode": "residual"})
    with pytest.raises(ValueError, match="aux_loss_alpha"):
        tiny_whole_config(aux_loss_alpha=-1.0)
    with pytest.raises(ValueError, match="topk_method"):
        tiny_whole_config(text_config={"topk_method": "group_limited_greedy"})


def inputs_of(model) -> dict:
    """One image of 2 x 2 tokens, and text."""
    draw = torch.Generator().manual_seed(3)
    text = torch.randint(5, 261, (2, 9), generator=draw)
    image = torch.full((2, 7), model.config.image_token_id)
    pixel_values = torch.randn(2, 3, 128, 128, generator=draw)
    return {"input_ids": torch.cat([image, text], dim=1), "pixel_values": pixel_values}


def test_loading_takes_the_memory_of_the_weights(tmp_path):
    """Pins a loader that holds a file, or all of them, beside the model."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 64, "num_hidden_layers": 4}
    write_released(tmp_path / "released", tiny_whole_model(text_config=sizes), num_shards=2)
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "released").glob("*.safetensors"))
    assert num_bytes > 600_000_000
    output = run_python(f"""
        import resource
        from deepseek_ocr_vision.composites import DeepSeekOCRForConditionalGeneration
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = DeepSeekOCRForConditionalGeneration.from_deepseek_ocr({str(tmp_path / "released")!r})
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """)
    assert int(output.split()[-1]) < num_bytes + 100_000_000
