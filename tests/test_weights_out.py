"""Weights out: a full checkpoint with the encoder's weights replaced, and everything else as it was."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    EVERY_FEATURE_MODE,
    assert_same_weights,
    pixels,
    released_tensors,
    run_python,
    tiny_config,
    write_checkpoint,
)
from safetensors.torch import load_file

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.saving.checksums import verify_checksums, write_checksums
from deepseek_ocr_vision.weights import writing
from deepseek_ocr_vision.weights.names import our_name


@pytest.fixture
def base(tmp_path) -> Path:
    """A released checkpoint in three files, with what lies beside such a one."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="projected"))
    folder = write_checkpoint(tmp_path / "base", released_tensors(model), model.config, num_shards=3)
    (folder / "assets").mkdir()
    (folder / "assets" / "figure.png").write_bytes(b"image")
    return folder


def trained(base: Path, feature_mode: str = "concat", **kwargs) -> DeepSeekOCRVisionModel:
    """The base's encoder after one step of training."""
    model = DeepSeekOCRVisionModel.from_deepseek_ocr(base, feature_mode=feature_mode, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(pixels()).last_hidden_state.square().mean().backward()
    optimizer.step()
    return model


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_in_trained_out_and_in_again_is_exact(tmp_path, base, feature_mode):
    """Pins the round trip, which nobody else offers: each weight comes back bit for bit, and moved."""
    before = DeepSeekOCRVisionModel.from_deepseek_ocr(base, feature_mode=feature_mode)
    model = trained(base, feature_mode)
    model.write_deepseek_ocr(base, tmp_path / "out")
    again = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "out", feature_mode=feature_mode)
    assert_same_weights(again, model)
    assert not torch.equal(again.sam_model.pos_embed, before.sam_model.pos_embed)


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_everything_else_stays_byte_for_byte(tmp_path, base, feature_mode):
    """Pins headers, order, language model, index, configuration and tokenizer; and the report of what was kept."""
    model = trained(base, feature_mode)
    report = model.write_deepseek_ocr(base, tmp_path / "out")
    before, after = contents(base), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if not name.endswith(".safetensors"))
    old, new = tensors_in(base), tensors_in(tmp_path / "out")
    replaced = {name for name in old if our_name(name).key in model.state_dict()}
    assert set(report.replaced) == replaced
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - replaced)
    for name in before:
        if name.endswith(".safetensors"):
            size = 8 + int.from_bytes(before[name][:8], "little")
            assert before[name][:size] == after[name][:size]
            assert len(before[name]) == len(after[name])
    kept = {f"model.vision_model.embeddings.{n}" for n in ("patch_embedding.weight", "position_ids")}
    if feature_mode == "residual":
        kept.add("model.vision_model.embeddings.class_embedding")
    if feature_mode in ("residual", "concat"):
        kept |= {f"model.projector.layers.{n}" for n in ("weight", "bias")}
    if feature_mode != "sequence":
        kept |= {"model.image_newline", "model.view_seperator"}
    assert set(report.kept) == kept
    assert all(name in str(report) for name in kept)


def test_the_base_keeps_its_dtype_and_the_report_says_what_was_rounded(tmp_path, base):
    """Pins float32 training of bfloat16 weights: what goes out is bfloat16 again, and no secret is made of it."""
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors_in(base).items()}
    half = write_checkpoint(tmp_path / "half", tensors, tiny_config())
    model = trained(half, dtype=torch.float32)
    report = model.write_deepseek_ocr(half, tmp_path / "out")
    assert "sam_model.neck.0.weight" in {our_name(name).key for name in report.rounded}
    assert "rounded to the base's dtype" in str(report)
    again = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "out", feature_mode="concat")
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key].bfloat16()), key
    untouched = DeepSeekOCRVisionModel.from_deepseek_ocr(half, dtype=torch.float32)
    assert untouched.write_deepseek_ocr(half, tmp_path / "same").rounded == []
    assert tensors_in(tmp_path / "same").keys() == tensors_in(half).keys()


@pytest.mark.parametrize("save_original_format", [True, False])
def test_unlimited_ocr_loads_what_was_written_in_its_own_names(tmp_path, save_original_format):
    """Pins query, key and value apart: transformers' model computes our model's tokens afterwards."""
    pytest.importorskip("transformers.models.unlimited_ocr", reason="this transformers has no Unlimited-OCR")
    from transformers import UnlimitedOcrConfig, UnlimitedOcrForConditionalGeneration

    sam = {name: value for name, value in tiny_config().sam_config.to_dict().items() if name != "model_type"}
    encoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "vocab_size": 200, "n_routed_experts": 4, "moe_intermediate_size": 16}
    vision = {"sam_config": sam, "encoder_config": encoder | {"image_size": 28, "patch_size": 14}}
    config = UnlimitedOcrConfig(vision_config=vision, text_config=text, image_token_id=199)
    composite = UnlimitedOcrForConditionalGeneration(config)
    composite.save_pretrained(tmp_path / "base", save_original_format=save_original_format)
    model = trained(tmp_path / "base")
    report = model.write_deepseek_ocr(tmp_path / "base", tmp_path / "out")
    assert any(name.endswith(".q_proj.weight") for name in report.replaced) != save_original_format
    written, info = UnlimitedOcrForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = model(pixels()).last_hidden_state
    assert torch.allclose(written.model.vision_tower(pixels()).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_a_merged_lora_goes_out_and_an_unmerged_one_is_an_error(tmp_path, base):
    """Pins adapters, whose weights would be left behind in silence."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = DeepSeekOCRVisionModel.from_deepseek_ocr(base, feature_mode="concat")
    before = model.vision_model.transformer.layers[0].self_attn.qkv_proj.weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["qkv_proj", "lin1"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="merge_and_unload"):
        adapted.base_model.model.write_deepseek_ocr(base, tmp_path / "out")
    expected = adapted.eval()(pixels()).last_hidden_state
    merged = adapted.merge_and_unload()
    merged.write_deepseek_ocr(base, tmp_path / "out")
    again = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "out", feature_mode="concat")
    assert torch.allclose(again(pixels()).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(again.vision_model.transformer.layers[0].self_attn.qkv_proj.weight, before)


def test_a_base_of_one_file_gives_one_file(tmp_path, base):
    """Pins a checkpoint that somebody keeps without a folder."""
    write_checkpoint(tmp_path / "one", tensors_in(base), tiny_config())
    (file,) = (tmp_path / "one").glob("*.safetensors")
    model = trained(base)
    model.write_deepseek_ocr(file, tmp_path / "out.safetensors")
    again = DeepSeekOCRVisionModel.from_deepseek_ocr(tmp_path / "out.safetensors", config=tiny_config())
    assert torch.equal(again.sam_model.pos_embed, model.sam_model.pos_embed)


def test_only_what_belongs_to_a_checkpoint_is_copied(tmp_path, base):
    """Pins secrets, pickles with the old weights, and files of other runs."""
    for name in (".env", "pytorch_model.bin", "optimizer.pt", "old.safetensors", ".git/config", "x.tmp"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("secret")
    report = trained(base).write_deepseek_ocr(base, tmp_path / "out")
    assert set(report.left_out) == {
        ".env",
        "pytorch_model.bin",
        "optimizer.pt",
        "old.safetensors",
        ".git/config",
        "x.tmp",
    }
    assert not any(b"secret" in data for data in contents(tmp_path / "out").values())


def test_a_snapshot_of_links_is_copied_as_files(tmp_path, base):
    """Pins the Hub's cache, whose snapshots are links to blobs elsewhere."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in base.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    trained(base).write_deepseek_ocr(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in snapshot.iterdir()}


def test_checksums_of_the_base_are_made_anew(tmp_path, base):
    """Pins sums that would accuse the new weights."""
    shutil.rmtree(base / "assets")
    write_checksums(base)
    trained(base).write_deepseek_ocr(base, tmp_path / "out")
    assert set(verify_checksums(tmp_path / "out")) == {path.name for path in base.iterdir()} - {"SHA256SUMS"}


# Faults


def test_nothing_is_overwritten(tmp_path, base):
    """Pins the base itself, a folder within it, and what somebody has under the target's name."""
    model = trained(base)
    before = contents(base)
    (tmp_path / "file").write_text("mine")
    for target, error in ((base, ValueError), (base / "sub", ValueError), (tmp_path / "file", FileExistsError)):
        with pytest.raises(error, match=str(target)):
            model.write_deepseek_ocr(base, target)
    assert contents(base) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_weight_that_is_no_number_or_too_large_is_an_error_and_nothing_is_written(tmp_path, base):
    """Pins a run that diverged, and a base in half precision."""
    model = trained(base)
    model.sam_model.neck[1].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"sam_model\.neck\.1\.bias holds NaN or infinity"):
        model.write_deepseek_ocr(base, tmp_path / "out")
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors_in(base).items()}
    half = write_checkpoint(tmp_path / "half", tensors, tiny_config())
    model.sam_model.neck[1].bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"neck\.1\.bias has values too large for torch\.float16"):
        model.write_deepseek_ocr(half, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "half"}


def test_a_base_of_another_size_or_kind_is_an_error(tmp_path, base):
    """Pins a base given by mistake, before anything is written."""
    wide = tiny_config(clip_config=tiny_config().clip_config.to_dict() | {"intermediate_size": 96})
    with pytest.raises(ValueError, match="have another shape"):
        DeepSeekOCRVisionModel(wide).write_deepseek_ocr(base, tmp_path / "out")
    for missing in (tmp_path / "nowhere", "nowhere"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            trained(base).write_deepseek_ocr(missing, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing_under_the_targets_name(tmp_path, base, monkeypatch):
    """Pins Ctrl-C and a full disk half-way: the second file is not written."""
    model = trained(base)
    write_file = writing._write_file
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        written = []

        def break_off(checkpoint, file, path, error=error, written=written, **options):
            if written:
                raise error
            written.append(file)
            write_file(checkpoint, file, path, **options)

        monkeypatch.setattr(writing, "_write_file", break_off)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            model.write_deepseek_ocr(base, tmp_path / "out")
        assert written
        assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_disk_that_is_too_small_is_an_error_before_the_first_byte(tmp_path, base, monkeypatch):
    """Pins half an hour of writing that ends in an error."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"out needs .* GB, .* has 0\.00 GB free"):
        trained(base).write_deepseek_ocr(base, tmp_path / "out")


def test_memory_stays_below_the_model_and_its_largest_tensor(tmp_path):
    """Pins streaming: the base is eight times the encoder, and the encoder is not copied either."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
    fields = {"sam_config": tiny_config().sam_config.to_dict() | {"downsample_channels": [24, 512]}}
    config = tiny_config(**fields, clip_config=sizes | {"grid_size": 2})
    with torch.device("meta"):
        model = DeepSeekOCRVisionModel(config)
    tensors = {f"model.{key}": torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}
    vision_bytes = sum(tensor.nbytes for tensor in tensors.values())
    tensors |= {f"model.layers.{index}.mlp.weight": torch.ones(16, 2_000_000) for index in range(8)}
    write_checkpoint(tmp_path / "base", tensors, config, num_shards=2)
    digests = {}
    for folder in ("base", "out"):
        if folder == "out":
            output = run_python(f"""
                import resource
                from deepseek_ocr_vision import DeepSeekOCRVisionModel
                model = DeepSeekOCRVisionModel.from_deepseek_ocr({os.fspath(tmp_path / "base")!r})
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                model.write_deepseek_ocr({os.fspath(tmp_path / "base")!r}, {os.fspath(tmp_path / "out")!r})
                print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
            """)
            assert int(output) < vision_bytes / 4
        paths = sorted((tmp_path / folder).glob("*.safetensors"))
        digests[folder] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert digests["out"] == digests["base"]
