"""The example that fine-tunes the whole model: scores, adapters, going on where it was, and what it leaves."""

import json
import shutil
import sys

import pytest
import torch
from helpers import ROOT
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from whole_model import tiny_whole_model, write_released


pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    torch.manual_seed(0)
    return write_released(tmp_path_factory.mktemp("finetune") / "released", tiny_whole_model())


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Six pages with a digit each."""
    folder = tmp_path_factory.mktemp("pages")
    rows = []
    for digit in range(6):
        page = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(page).text((50, 30), str(digit), fill="black", font_size=90)
        page.save(folder / f"{digit}.png")
        rows.append(json.dumps({"file_name": f"{digit}.png", "text": str(digit)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def finetune(released, pages, output, *options: str) -> dict:
    import finetune_deepseek_ocr

    arguments = ["--model", str(released), "--data", str(pages), "--output_dir", str(output), "--mode", "tiny"]
    arguments += ["--max_steps", "3", "--save_steps", "1", "--logging_steps", "1", "--use_cpu", "--dtype", "float32"]
    arguments += ["--max_new_tokens", "4", "--gradient_accumulation_steps", "1", "--held_out_fraction", "0.34"]
    finetune_deepseek_ocr.main([*arguments, "--save_total_limit", "9", "--disable_tqdm", "true", *options])
    return json.loads((output / "result.json").read_text())


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_frozen_group_stays_and_the_rest_is_trained_and_written_back(released, pages, tmp_path):
    """Pins the path from a folder of pages to a released checkpoint, and a run that goes on where it was cut off."""
    result = finetune(released, pages, tmp_path / "out", "--freeze", "sam", "language_model.embed_tokens")
    assert result["steps"] == len(result["losses"]) == 3
    before, after = tensors_of(released), tensors_of(tmp_path / "out" / "released")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "model.sam_model.pos_embed"} <= same
    assert not {"model.image_newline", "lm_head.weight", "model.layers.1.mlp.experts.0.up_proj.weight"} & same
    with pytest.raises(FileExistsError, match="this run is finished"):
        finetune(released, pages, tmp_path / "out")

    for name in ("released", "checkpoint-3", "checkpoint-2"):
        shutil.rmtree(tmp_path / "out" / name)
    resumed = finetune(released, pages, tmp_path / "out", "--freeze", "sam", "language_model.embed_tokens")
    assert resumed["losses"] == pytest.approx(result["losses"], rel=1e-4)
    assert resumed["after"] == result["after"]


def test_adapters_are_trained_merged_and_written_back(released, pages, tmp_path):
    """Pins `--lora`: nothing but the adapted layers changes."""
    pytest.importorskip("peft")
    finetune(released, pages, tmp_path / "out", "--lora", "clip", "attention", "--lora_rank", "2")
    before, after = tensors_of(released), tensors_of(tmp_path / "out" / "released")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert all("self_attn" in name or ".mlp.fc" in name for name in changed)


def test_mistakes_are_named_before_anything_is_trained(released, pages, tmp_path):
    """Pins a part that does not exist, and a column that is not there."""
    with pytest.raises(ValueError, match=r"--lora has \['decoder'\]"):
        finetune(released, pages, tmp_path / "out", "--lora", "decoder")
    with pytest.raises(ValueError, match="no 'words'"):
        finetune(released, pages, tmp_path / "other", "--text_column", "words")
