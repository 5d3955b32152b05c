"""`model.encode` and the pipeline: images in, tokens out, in one line."""

import numpy as np
import pytest
import torch
from helpers import pixels, relative_error, tiny_config
from PIL import Image
from torch import nn
from transformers import AutoModel, pipeline

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel


@pytest.fixture
def page(tmp_path):
    """An image on disk, and its path."""
    path = tmp_path / "page.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
    return path


def test_paths_images_and_arrays_become_tokens_one_tensor_each(tiny_model, page):
    """Pins what `deepseek-ocr-encoder` users call, with every kind of image in one list."""
    image = Image.open(page)
    tokens = tiny_model.encode([page, str(page), image, np.asarray(image)])
    assert [t.shape for t in tokens] == [(4, 32)] * 4
    assert all(torch.equal(t, tokens[0]) for t in tokens)


def test_one_image_need_not_be_in_a_list(tiny_model, page):
    """Pins the one-line use."""
    (tokens,) = tiny_model.encode(page)
    assert torch.equal(tokens, tiny_model.encode([page])[0])


def test_the_tokens_train_what_is_put_on_them(tiny_model, page):
    """Pins "Inference tensors cannot be saved for backward", which that package's tokens end in."""
    (tokens,) = tiny_model.encode(page)
    assert not tokens.requires_grad
    assert not tokens.is_inference()
    projector = nn.Linear(32, 4)
    projector(tokens).sum().backward()
    assert projector.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_change_nothing_but_the_speed(tiny_model, page, batch_size):
    """Pins the last, smaller batch."""
    images = [Image.open(page).rotate(angle) for angle in range(5)]
    expected = torch.stack(tiny_model.encode(images))
    assert relative_error(torch.stack(tiny_model.encode(images, batch_size=batch_size)), expected) < 1e-5


def test_stacked_images_pass_one_by_one_unless_asked_for_more(tiny_model):
    """Pins a tensor of many pages that went through the model at once, whatever `batch_size` said."""
    sizes = []
    tiny_model.register_forward_pre_hook(
        lambda module, inputs, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    stack = torch.randint(0, 256, (3, 3, 50, 70), dtype=torch.uint8)
    expected = tiny_model.encode(list(stack))
    assert torch.equal(torch.stack(tiny_model.encode(stack)), torch.stack(expected))
    assert len(tiny_model.encode(stack.numpy(), batch_size=2)) == 3
    assert sizes == [1] * 6 + [2, 1]


@pytest.mark.parametrize("feature_mode", ["residual", "concat", "projected"])
def test_the_preset_follows_the_feature_mode(page, feature_mode):
    """Pins tokens of one preprocessing under the features of another, which nothing would report."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    preset = "deepseek-ocr-encoder" if feature_mode == "residual" else "deepseek-ocr"
    image_processor = DeepSeekOCRVisionImageProcessor(preset, size=128)
    expected = model.encode(page, image_processor=image_processor)[0]
    assert torch.equal(model.encode(page)[0], expected)
    pixel_values = image_processor(page, return_tensors="pt").pixel_values
    assert relative_error(model(pixel_values).last_hidden_state[0], expected) < 1e-5


def test_the_checkpoints_own_image_processor_comes_first(tmp_path, tiny_model, page):
    """Pins a model that was trained at another size than its config's."""
    tiny_model.save_pretrained(tmp_path / "model")
    DeepSeekOCRVisionImageProcessor(size={"height": 192, "width": 128}).save_pretrained(tmp_path / "model")
    assert AutoModel.from_pretrained(tmp_path / "model").encode(page)[0].shape == (6, 32)


@pytest.mark.parametrize("images", [[], None, [None]])
def test_no_images_are_an_error(tiny_model, images):
    """Pins an empty list of files, from a pattern that matched none."""
    with pytest.raises((TypeError, ValueError), match="images"):
        tiny_model.encode(images)


def test_a_batch_size_below_one_is_an_error(tiny_model, page):
    """Pins the argument's range, and its type: a comparison of text and numbers names no argument."""
    with pytest.raises(ValueError, match="batch_size"):
        tiny_model.encode(page, batch_size=0)
    with pytest.raises(TypeError, match="`batch_size` is 'x'; it has to be an integer of at least 1"):
        tiny_model.encode(page, batch_size="x")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_error_names_the_image_by_its_place_in_the_whole_list(tiny_model, page, batch_size, tmp_path):
    """Pins an index in the batch, by which the caller finds another image than the broken one."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(page.read_bytes()[:100])
    with pytest.raises(TypeError, match=r"images\[5\] is of type int"):
        tiny_model.encode([page] * 5 + [7], batch_size=batch_size)
    with pytest.raises(OSError, match=r"images\[3\] .*broken\.png"):
        tiny_model.encode([page] * 3 + [broken, page], batch_size=batch_size)


def test_a_missing_file_is_an_error_with_its_path(tiny_model):
    """Pins a misspelt path."""
    with pytest.raises(FileNotFoundError, match=r"no_such_page\.png"):
        tiny_model.encode("no_such_page.png")


def test_it_is_a_feature_extraction_pipeline(tiny_model, page):
    """Pins `pipeline("image-feature-extraction")`."""
    extract = pipeline(
        "image-feature-extraction", model=tiny_model.eval(), image_processor=DeepSeekOCRVisionImageProcessor(size=128)
    )
    features = torch.tensor(extract(str(page)))
    assert relative_error(features[0], tiny_model.encode(page)[0]) < 1e-5


@pytest.mark.parametrize("size", [128, 192, {"height": 128, "width": 256}])
@pytest.mark.parametrize("preset", ["deepseek-ocr-encoder", "deepseek-ocr"])
def test_the_processor_counts_as_many_tokens_as_the_model_gives(tiny_model, page, preset, size):
    """Pins placeholders in a prompt, which have to be as many as the tokens that take their place."""
    image_processor = DeepSeekOCRVisionImageProcessor(preset, size=size)
    (tokens,) = tiny_model.encode(page, image_processor=image_processor)
    assert len(tokens) == image_processor.num_image_tokens(90, 120)


def test_the_pixels_of_helpers_are_the_same_at_every_call():
    """Pins the tests' own instrument."""
    assert torch.equal(pixels(), pixels())
