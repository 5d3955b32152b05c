"""Layer groups: which parameters are trained and which are frozen."""

import pytest
from helpers import EVERY_FEATURE_MODE, tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionModel


def trainable(model: DeepSeekOCRVisionModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_every_parameter_is_in_exactly_one_group(feature_mode):
    """Pins a parameter left out of freezing, or decayed twice."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    grouped = [id(parameter) for group in model.layer_groups().values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_groups_are_in_the_order_of_the_data():
    """Pins layer-wise learning-rate decay, which counts from the end."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="sequence"))
    assert list(model.layer_groups()) == [
        "sam.patch_embed",
        "sam.blocks.0",
        "sam.blocks.1",
        "sam.neck",
        "sam.compressor",
        "clip.embeddings",
        "clip.layers.0",
        "clip.layers.1",
        "projector",
        "sequence",
    ]


def test_freezing_a_stage_freezes_all_of_it_and_nothing_else(tiny_model):
    """Pins names that stand for all groups below them."""
    assert tiny_model.freeze("sam") is tiny_model
    assert all(name.startswith("vision_model.") for name in trainable(tiny_model))
    assert all(not parameter.requires_grad for parameter in tiny_model.sam_model.parameters())
    assert all(parameter.requires_grad for parameter in tiny_model.vision_model.parameters())


def test_groups_can_be_frozen_one_by_one(tiny_model):
    """Pins that `sam.blocks.1` is one block, and no prefix of another's name."""
    tiny_model.freeze().unfreeze("sam.blocks.1", "clip.layers")
    prefixes = ("sam_model.blocks.1.", "vision_model.transformer.layers.")
    assert trainable(tiny_model) == {name for name, _ in tiny_model.named_parameters() if name.startswith(prefixes)}


def test_without_names_everything_is_meant(tiny_model):
    """Pins `freeze()` and `unfreeze()`."""
    assert trainable(tiny_model.freeze()) == set()
    assert trainable(tiny_model.unfreeze()) == {name for name, _ in tiny_model.named_parameters()}


@pytest.mark.parametrize("name", ["sam.block", "vision", "sam.blocks.2", "projector", "", "clip.layers.0.mlp"])
def test_an_unknown_group_is_an_error_with_the_list_and_changes_nothing(tiny_model, name):
    """Pins a misspelt name after good ones: an encoder half frozen would train without a word."""
    with pytest.raises(ValueError, match=r"sam\.patch_embed, sam\.blocks.*clip\.layers"):
        tiny_model.freeze("sam", name)
    assert len(trainable(tiny_model)) == len(list(tiny_model.parameters()))
