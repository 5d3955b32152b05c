"""Staging a checkpoint for the Hub."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT, pixels, tiny_config
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, CLIPVisionConfig, CLIPVisionModel

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.configuration.checkpoint_code_deepseek_ocr_vision import FLAT_CODE
from deepseek_ocr_vision.hub_upload import main, stage


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a model alone, in bfloat16."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="concat")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_staged_folder_holds_weights_settings_and_code_and_nothing_else(tmp_path, checkpoint):
    """Pins what gets published: an optimizer state or a stray file of the checkpoint must not."""
    (checkpoint / "optimizer.pt").write_text("state")
    (checkpoint / ".env").write_text("TOKEN=secret")
    files = {path.name for path in stage(checkpoint, tmp_path / "staged")}
    code = {f"{name}_deepseek_ocr_vision.py" for names in FLAT_CODE.values() for name in names}
    assert files == code | {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_staging_keeps_every_weight_and_its_dtype(tmp_path, checkpoint):
    """Pins the model on the way through."""
    stage(checkpoint, tmp_path / "staged")
    before = AutoModel.from_pretrained(checkpoint, dtype="auto")
    after = AutoModel.from_pretrained(tmp_path / "staged", dtype="auto")
    assert after.dtype == torch.bfloat16
    assert torch.equal(after(pixels()).last_hidden_state, before(pixels()).last_hidden_state)


def test_the_image_processor_is_the_checkpoints_or_the_one_that_belongs_to_it(tmp_path, checkpoint):
    """Pins tokens of another preprocessing than the model was trained with."""
    stage(checkpoint, tmp_path / "first")
    staged = AutoImageProcessor.from_pretrained(tmp_path / "first")
    assert (staged.preset, staged.size) == ("deepseek-ocr", {"height": 128, "width": 128})
    DeepSeekOCRVisionImageProcessor("deepseek-ocr-encoder", size=192).save_pretrained(checkpoint)
    stage(checkpoint, tmp_path / "second")
    staged = AutoImageProcessor.from_pretrained(tmp_path / "second")
    assert (staged.preset, staged.size) == ("deepseek-ocr-encoder", {"height": 192, "width": 192})


def test_a_folder_that_is_there_is_not_touched(tmp_path, checkpoint):
    """Pins somebody's files under the target's name."""
    target = tmp_path / "staged"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=str(target)):
        stage(checkpoint, target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(tmp_path, checkpoint):
    """Pins a failure half-way: no folder, no temporary one."""
    save_file({"sam_model.pos_embed": torch.zeros(1)}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a DeepSeek-OCR vision checkpoint"):
        stage(checkpoint, tmp_path / "staged")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def test_another_model_is_refused(tmp_path):
    """Pins a folder given by mistake."""
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**fields, image_size=28, patch_size=14)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="CLIPVisionModel"):
        stage(tmp_path / "clip", tmp_path / "staged")


def test_the_command_says_what_it_wrote_and_what_went_wrong(tmp_path, checkpoint, capsys):
    """Pins output and exit codes."""
    assert main([str(checkpoint), str(tmp_path / "staged")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "other")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_the_script_runs_from_the_checkout():
    """Pins `python hub_upload.py --help`, which imports the package as everybody does."""
    command = [sys.executable, str(ROOT / "hub_upload.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "trust_remote_code" in result.stdout
