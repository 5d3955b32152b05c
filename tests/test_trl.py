"""The example `examples/train_with_trl.py`: TRL's `SFTTrainer` trains a LLaVA of ours."""

import json
import sys

import pytest
import torch
from helpers import ROOT
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from deepseek_ocr_vision import build_llava


pytest.importorskip("trl", reason="the extra `trl` is not installed")
sys.path.insert(0, str(ROOT / "examples"))

import train_with_trl


@pytest.mark.parametrize("lora", ["false", "true"])
def test_trl_trains_encoder_projector_and_language_model(tmp_path, lora):
    """Pins an encoder that stays as it was, image tokens cut off, and a folder that does not load."""
    pages = tmp_path / "pages"
    pages.mkdir()
    for index in range(2):
        Image.new("RGB", (100, 80), (90 * index, 0, 0)).save(pages / f"{index}.png")
    rows = [json.dumps({"file_name": f"{index}.png", "text": f"page {index}"}) for index in range(2)]
    (pages / "metadata.jsonl").write_text("\n".join(rows))
    options = ["--data", str(pages), "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--seed", "7"]
    options += ["--per_device_train_batch_size", "2", "--report_to", "none", "--learning_rate", "0.01"]
    options += ["--use_cpu", "true", "--bf16", "false", "--save_strategy", "no", "--page_size", "64"]
    torch.manual_seed(1)
    before, _ = build_llava(page_size=64)
    torch.manual_seed(1)
    train_with_trl.main([*options, "--lora", lora])
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    for part in ("vision_tower.sam_model.", "vision_tower.vision_model.", "multi_modal_projector.", "q_proj"):
        assert any(part in name for name in changed), part
    assert any("mlp" in name and "language_model" in name for name in changed) == (lora == "false")
    assert LlavaProcessor.from_pretrained(tmp_path / "out").chat_template
