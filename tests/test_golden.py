"""The full-size encoder against numbers that the original code gave."""

import pytest
import torch
from helpers import (
    IMPLEMENTATIONS,
    TOLERANCE,
    golden_features,
    golden_pixels,
    golden_shapes,
    needs_golden,
    relative_error,
)


pytestmark = needs_golden
FP32 = TOLERANCE[torch.float32]


@pytest.mark.parametrize("side", [512, 640])  # and of 1024 pixels with their gradients, below
def test_residual_features_are_those_of_deepseek_ocr_encoder(golden, golden_model, side):
    """Pins the class token that must be absent and the position table that must be resized without antialiasing."""
    with torch.no_grad():
        tokens = golden_model("residual")(golden_pixels(side)).last_hidden_state[0]
    assert relative_error(tokens, golden[f"residual_{side}"]) < FP32


@pytest.mark.parametrize("side", [512, 640, 1024])
def test_concat_features_and_both_stages_are_those_of_the_released_model(golden, golden_model, side):
    """Pins each stage by itself, the class token that is taken off, and the order: CLIP first, SAM second."""
    model, stages = golden_model("concat"), {}
    for stage in (model.sam_model, model.vision_model):
        stage.register_forward_hook(lambda stage, _, output: stages.update({stage: output}))
    with torch.no_grad():
        tokens = model(golden_pixels(side)).last_hidden_state[0]
    sam, clip = golden[f"sam_{side}"], golden[f"clip_{side}"]
    assert relative_error(stages[model.sam_model][0].flatten(1).t(), sam) < FP32
    assert relative_error(stages[model.vision_model].last_hidden_state[0], clip) < FP32
    assert relative_error(tokens, torch.cat([clip[1:], sam], dim=-1)) < FP32


@pytest.mark.parametrize(
    ("feature_mode", "side", "attn_implementation"),
    [("residual", 1024, "sdpa")] + [("concat", 512, name) for name in IMPLEMENTATIONS],
)
def test_gradients_are_those_of_the_original_code(golden, golden_model, feature_mode, side, attn_implementation):
    """Pins that no part of the way back is cut, scaled or approximated, down to the pixels, on any path."""
    model = golden_model(feature_mode)
    model.set_attn_implementation(attn_implementation)
    features = golden_features(golden, model, side)
    if feature_mode == "residual":
        assert relative_error(features, golden[f"residual_{side}"]) < FP32


def test_parameters_are_named_and_shaped_as_in_the_released_checkpoint(golden_model):
    """Pins the names, typos included: loading is taking a prefix off, and writing back is putting it on."""
    released = golden_shapes()
    unused = {"vision_model.embeddings.patch_embedding.weight"}
    concat = {name: tuple(value.shape) for name, value in golden_model("concat").state_dict().items()}
    residual = {name: tuple(value.shape) for name, value in golden_model("residual").state_dict().items()}
    assert concat == {key: shape for key, shape in released.items() if key not in unused}
    unused.add("vision_model.embeddings.class_embedding")
    assert residual == {key: shape for key, shape in released.items() if key not in unused}
