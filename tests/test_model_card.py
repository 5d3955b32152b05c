"""The model card: what the Hub reads of it, and what people do. Its code is run by test_hub_upload.py."""

import re

import pytest
import torch
from helpers import EVERY_FEATURE_MODE, tiny_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.hub_upload import stage
from deepseek_ocr_vision.saving.checksums import read_checksums


def staged_card(tmp_path, *, feature_mode="residual", dtype=torch.float32, image_processor=None, **options) -> str:
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).to(dtype)
    model.save_pretrained(tmp_path / "checkpoint")
    if image_processor is not None:
        image_processor.save_pretrained(tmp_path / "checkpoint")
    stage(tmp_path / "checkpoint", tmp_path / "staged", repo_id="me/encoder", **options)
    return (tmp_path / "staged" / "README.md").read_text()


def test_the_front_matter_is_what_the_hub_sorts_models_by(tmp_path):
    """Pins library, task, licence and origin, which the Hub shows and searches."""
    data = ModelCard(staged_card(tmp_path)).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert (data.license, data.base_model) == ("mit", "deepseek-ai/DeepSeek-OCR")
    assert "ocr" in data.tags


def test_a_model_trained_from_scratch_has_no_base_model(tmp_path):
    """Pins an origin that is not the model's."""
    card = staged_card(tmp_path, base_model=None, license="apache-2.0")
    assert ModelCard(card).data.base_model is None
    assert ModelCard(card).data.license == "apache-2.0"
    assert "trained from scratch" in card


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_shapes_and_preset_are_the_checkpoints(tmp_path, feature_mode):
    """Pins a card that describes another feature mode than the weights have."""
    card = staged_card(tmp_path, feature_mode=feature_mode)
    width = tiny_config(feature_mode=feature_mode).hidden_size
    preset = "deepseek-ocr-encoder" if feature_mode == "residual" else "deepseek-ocr"
    # In a sequence, rows of 2 and a newline, twice, and a separator.
    num_tokens = 7 if feature_mode == "sequence" else 4
    assert f"# [1, {num_tokens}, {width}], with gradients" in card
    assert "# [1, 3, 128, 128]" in card
    assert f"Feature mode `{feature_mode}`" in card
    assert f"Preset `{preset}`: pages are stretched to 128 x 128 pixels" in card


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": (64, 192), "do_pad": True}, "fitted into 64 x 192 pixels, the rest grey"),
        ({"size": 1024}, "fitted into 1024 x 1024 pixels, the rest grey"),
        ({"do_resize": False}, "left in their size, whose sides have to be multiples of 64"),
    ],
)
def test_the_geometry_is_the_image_processors(tmp_path, options, text):
    """Pins what the card says where the image processor is not the default one."""
    image_processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", **options)
    assert f"pages are {text}" in staged_card(tmp_path, feature_mode="concat", image_processor=image_processor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_are_measured(tmp_path, dtype):
    """Pins numbers that are written down instead of measured."""
    card = staged_card(tmp_path, dtype=dtype)
    weights = tmp_path / "staged" / "model.safetensors"
    name = str(dtype).removeprefix("torch.")
    assert f"| parameters | {sum(weight.numel() for weight in load_file(weights).values()):,}, {name} |" in card
    assert f"{weights.stat().st_size:,} bytes, sha256 `{read_checksums(weights.parent)[weights.name]}`" in card
    assert (
        f"largest difference 0.0 standard deviations, over the 4 tokens of a rendered page in {name} on the CPU"
        in card
    )


def test_the_card_cites_the_paper_and_leaves_no_gap(tmp_path):
    """Pins a placeholder that was not filled, and lines of the template that are not the card's."""
    card = staged_card(tmp_path)
    assert "arXiv:2510.18234" in card
    assert "DeepSeek-OCR: Contexts Optical Compression" in card
    assert not re.search(r"\$\w|None|\{\w+\}(?!,)", card.split("```bibtex")[0])
