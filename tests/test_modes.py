"""The released model's resolutions: pages, tiles and how many tokens they are, by name."""

import json
import random

import numpy as np
import pytest
import torch
from helpers import EVERY_FEATURE_MODE, GOLDEN, needs_golden, tiny_config
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import MODES
from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import cut, tile_grid


TOKENS = {"tiny": 64, "small": 100, "base": 256, "large": 400}
ROUNDING = 1e-6


def new_image(height: int, width: int) -> Image.Image:
    """Noise, the same at every call."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Grids and pixels


@needs_golden
def test_grids_are_those_of_the_released_code():
    """Pins the choice of a grid, ties included: another grid is another resize, other tiles and other tokens."""
    entries = json.loads((GOLDEN / "tile_grids.json").read_text())
    # The file has the choice for every size; what is no larger than a tile is not cut, and never gets that far.
    entries = [entry for entry in entries if max(entry["width"], entry["height"]) > 640]
    assert len(entries) > 90
    for entry in entries:
        grid = tile_grid(entry["height"], entry["width"], tile_size=640, max_tiles=entry["max_tiles"])
        assert list(grid) == entry["grid_columns_rows"], entry


def test_grids_are_those_of_unlimited_ocr_for_any_size_and_number_of_tiles():
    """Pins sizes that the golden file does not have: exact ratios, squares, strips, other tiles."""
    module = pytest.importorskip(
        "transformers.models.unlimited_ocr.image_processing_unlimited_ocr", reason="this transformers has none"
    )
    draw = random.Random(0)
    sizes = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(500)]
    sizes += [
        (rows * side, columns * side) for side in (300, 453, 641) for rows in range(1, 8) for columns in range(1, 8)
    ]
    for height, width in sizes:
        for tile_size, max_tiles in ((640, 6), (640, 9), (128, 32), (64, 2)):
            if max(height, width) > tile_size:
                expected = module.get_optimal_tiled_canvas((height, width), (tile_size, tile_size), 2, max_tiles)
                assert tile_grid(height, width, tile_size=tile_size, max_tiles=max_tiles) == expected, (height, width)


@needs_golden
@pytest.mark.parametrize("max_patches", [6, 9])
def test_tiles_and_page_are_those_of_the_released_code(max_patches):
    """Pins the order of the tiles, the resize without padding under them, and the padded page beside them."""
    golden = load_file(GOLDEN / "upstream_golden.safetensors")
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam", max_patches=max_patches)
    features = processor(GOLDEN / "page.png", return_tensors="pt")
    assert features.pixel_values.shape == (1, 3, 1024, 1024)
    assert features.pixel_values_local.shape == (6, 3, 640, 640)
    assert (features.num_local_patches, features.patches_grid) == ([6], [[3, 2]])
    tiles = features.pixel_values_local[..., ::16, ::16]
    torch.testing.assert_close(tiles, golden["preproc_deepseek_tiles_crop"], rtol=0, atol=ROUNDING)
    page = features.pixel_values[0, :, ::16, ::16]
    torch.testing.assert_close(page, golden["preproc_deepseek_1024_crop"], rtol=0, atol=ROUNDING)


def test_tiles_are_cut_in_reading_order():
    """Pins rows and columns mixed up, which any square grid hides."""
    pixels = torch.arange(4 * 6).view(1, 1, 4, 6).expand(1, 3, 4, 6)
    tiles = cut(pixels, 2)
    assert tiles.shape == (1, 6, 3, 2, 2)
    assert tiles[0, :, 0, 0, 0].tolist() == [0, 2, 4, 12, 14, 16]
    assert tiles[0, 1, 2].tolist() == [[2, 3], [8, 9]]


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_a_batch_of_any_images_equals_its_images_one_by_one(backend):
    """Pins tiles that end up with another image: large and small ones, tensors of one shape, floats, a path's."""
    if backend == "torchvision":
        pytest.importorskip("torchvision")
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=128, tile_size=64, resize_backend=backend)
    pages = [
        new_image(200, 100),
        new_image(40, 60),
        new_image(90, 300),
        new_image(200, 100).rotate(180),
        new_image(64, 64),
    ]
    tensors = [torch.from_numpy(np.array(page)).permute(2, 0, 1) for page in pages]
    images = [tensors[0], pages[1], np.array(pages[2]) / 255, tensors[3], tensors[4]]
    batch = processor(images, return_tensors="pt")
    assert batch.num_local_patches == [2, 0, 3, 2, 0]
    assert batch.patches_grid == [[1, 2], [1, 1], [3, 1], [1, 2], [1, 1]]
    alone = [processor(image, return_tensors="pt") for image in images]
    for name in ("pixel_values", "pixel_values_local"):
        torch.testing.assert_close(batch[name], torch.cat([one[name] for one in alone]), rtol=0, atol=0)
    assert batch.pixel_values_local.unique().numel() > 200


def test_small_images_leave_an_empty_batch_of_tiles():
    """Pins the key that is missing in Unlimited-OCR then: one process would take another way than the others."""
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam")
    features = processor([new_image(640, 640), new_image(1, 1)], return_tensors="pt")
    assert features.pixel_values_local.shape == (0, 3, 640, 640)
    assert (features.num_local_patches, features.patches_grid) == ([0, 0], [[1, 1], [1, 1]])
    features = processor(new_image(5, 5), return_tensors="np", data_format="channels_last")
    assert features.pixel_values_local.shape == (0, 640, 640, 3)
    assert processor(new_image(5, 5)).pixel_values_local == []


def test_tiles_come_in_the_container_and_order_that_were_asked_for():
    """Pins options that reach the page and not the tiles."""
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=128, tile_size=64)
    page = new_image(100, 200)
    tensors = processor(page, return_tensors="pt").pixel_values_local
    array = processor(page, return_tensors="np", data_format="channels_last").pixel_values_local
    np.testing.assert_array_equal(array, tensors.permute(0, 2, 3, 1).numpy())
    assert [tile.shape for tile in processor(page).pixel_values_local] == [(3, 64, 64)] * 2
    raw = processor(page, return_tensors="pt", do_normalize=False, do_rescale=False).pixel_values_local
    torch.testing.assert_close((raw / 255 - 0.5) / 0.5, tensors)
    floats = processor(np.array(page) / 255, return_tensors="pt", do_rescale=False).pixel_values_local
    torch.testing.assert_close(floats, tensors, rtol=0, atol=ROUNDING)


def test_without_tiles_there_are_only_pixel_values():
    """Pins LLaVA, which hands on whatever the image processor gives."""
    features = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="tiny")(new_image(700, 700), return_tensors="pt")
    assert list(features) == ["pixel_values"]


# Names and sizes


@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_is_its_sizes_in_the_constructor_a_call_a_field_and_a_folder(mode, tmp_path):
    """Pins a mode that is forgotten on one of the ways it may come."""
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode=mode)
    assert (processor.size["height"], processor.size["width"]) == (MODES[mode].size,) * 2
    assert (processor.mode, processor.tile_size) == (mode, MODES[mode].tile_size)
    by_size = DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=MODES[mode].size, tile_size=MODES[mode].tile_size)
    assert by_size.to_dict() == processor.to_dict()
    assert processor.to_dict()["mode"] == mode
    DeepSeekOCRVisionProcessor(processor).save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    other = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="large" if mode == "gundam" else "gundam")
    expected = processor(new_image(30, 700), return_tensors="pt")
    called = other(new_image(30, 700), return_tensors="pt", mode=mode)
    assert called.keys() == expected.keys()
    assert torch.equal(called.pixel_values, expected.pixel_values)
    other.mode = mode
    assert other.to_dict() == processor.to_dict()


def test_a_mode_and_a_size_that_differ_are_an_error_and_one_replaces_the_other():
    """Pins a page of one size under the name of another; which of the two counts must not be a guess."""
    with pytest.raises(ValueError, match=r"`size` is .*512.*, but in mode 'base' it is .*1024.*; give one of the two"):
        DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="base", size=512)
    with pytest.raises(ValueError, match="`tile_size` is 128, but in mode 'gundam' it is 640"):
        DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam", tile_size=128)
    with pytest.raises(ValueError, match="`tile_size` is 640, but in mode 'base' it is None"):
        DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="base", tile_size=640)
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam", size=(1024, 1024), tile_size=640)
    with pytest.raises(ValueError, match=r"`size` is .*512.*, but in mode 'base'"):
        processor(new_image(9, 9), mode="base", size=512)
    assert processor(new_image(9, 9), size=512, return_tensors="pt").pixel_values.shape[-1] == 512
    assert list(processor(new_image(9, 9), mode="tiny")) == ["pixel_values"]
    assert processor.mode == "gundam"
    base = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="base")
    assert base(new_image(64, 128), do_resize=False, return_tensors="pt").pixel_values.shape == (1, 3, 64, 128)
    assert DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=(1024, 512)).mode is None


def test_what_is_replaced_while_loading_replaces_what_belongs_to_it(tmp_path):
    """Pins a folder's mode against a size, a mode or a preset that the caller names."""
    DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam").save_pretrained(tmp_path)
    load = DeepSeekOCRVisionImageProcessor.from_pretrained
    assert (load(tmp_path).mode, load(tmp_path, mode="base").mode, load(tmp_path, mode=None).mode) == (
        "gundam",
        "base",
        "gundam",
    )
    assert load(tmp_path, tile_size=None).mode == "base"
    smaller = load(tmp_path, size=512)
    assert (smaller.size["width"], smaller.tile_size, smaller.mode) == (512, 640, None)
    other = load(tmp_path, preset="deepseek-ocr-encoder")
    assert (other.size["width"], other.mode, other.image_mean[0]) == (1024, None, 0.48145466)
    only_a_name = {"preset": "deepseek-ocr", "mode": "small"}
    assert DeepSeekOCRVisionImageProcessor.from_dict(only_a_name).size["width"] == 640
    with pytest.raises(ValueError, match="in mode 'small'"):
        DeepSeekOCRVisionImageProcessor.from_dict(only_a_name | {"size": 1024})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "huge"}, "`mode` is 'huge'.*'tiny', 'small', 'base', 'large', 'gundam'"),
        ({"mode": "base", "preset": "deepseek-ocr-encoder"}, "`mode` is 'base'; with preset 'deepseek-ocr-encoder'"),
        ({"tile_size": 100}, "tile_size is 100 x 100 .* nearest size is 128 x 128"),
        ({"tile_size": 0}, "nearest size is 64 x 64"),
        ({"max_patches": 1}, "`max_patches` is 1; .* at least 2"),
        ({"mode": "gundam", "do_resize": False}, "`do_resize` is False, but `mode` 'gundam'"),
        ({"tile_size": 64, "do_resize": False}, "`do_resize` is False, but `tile_size` 64"),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_name(fields, message):
    """Pins a misspelt mode, which must not become the default."""
    with pytest.raises(ValueError, match=message):
        DeepSeekOCRVisionImageProcessor(**({"preset": "deepseek-ocr"} | fields))


@pytest.mark.parametrize("fields", [{"mode": 640}, {"tile_size": "640"}, {"tile_size": True}, {"max_patches": 6.0}])
def test_values_of_another_type_are_refused_by_name(fields):
    """Pins a number given as text, and a mode given as its size."""
    ((name, value),) = fields.items()
    with pytest.raises(TypeError, match=f"`{name}` is {value!r}"):
        DeepSeekOCRVisionImageProcessor("deepseek-ocr", **fields)


# Tokens


@pytest.mark.parametrize("mode", list(TOKENS))
def test_a_mode_has_the_paper_s_number_of_tokens(mode):
    """Pins the table of the paper, and the released sequence with a token more for each row and one for all."""
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode=mode)
    side = MODES[mode].size // 64
    assert processor.num_image_tokens(1754, 1240) == TOKENS[mode]
    assert processor.num_image_tokens(1754, 1240, feature_mode="sequence") == TOKENS[mode] + side + 1
    with pytest.raises(ValueError, match="`feature_mode` is 'both'"):
        processor.num_image_tokens(9, 9, feature_mode="both")


def test_gundam_has_a_hundred_tokens_a_tile_and_those_of_a_page():
    """Pins the formula of the released code: (rows x 10) x (columns x 10 + 1) + 16 x 17 + 1."""
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam")
    assert processor.num_image_tokens(1754, 1240) == 6 * 100 + 256
    assert processor.num_image_tokens(1754, 1240, feature_mode="sequence") == 30 * 21 + 16 * 17 + 1
    assert processor.num_image_tokens(640, 640) == 256
    assert processor.num_image_tokens(640, 640, feature_mode="sequence") == 273


@pytest.fixture(scope="module")
def models() -> dict[str, DeepSeekOCRVisionModel]:
    """A tiny model of each feature mode."""
    return {name: DeepSeekOCRVisionModel(tiny_config(feature_mode=name)).eval() for name in EVERY_FEATURE_MODE}


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_the_processor_counts_as_the_model_gives_for_images_of_any_size(models, feature_mode):
    """Pins placeholders in a prompt, one too many or too few of which and a composite refuses the batch."""
    draw = random.Random(1)
    sizes = [(draw.randint(1, 700), draw.randint(1, 700)) for _ in range(40)] + [
        (64, 64),
        (1, 700),
        (700, 1),
        (65, 64),
    ]
    for fields in ({}, {"tile_size": 64}, {"tile_size": 128, "max_patches": 3, "size": (64, 192)}):
        processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", **({"size": 128} | fields))
        tokens = models[feature_mode].encode(
            [new_image(*size) for size in sizes], image_processor=processor, batch_size=11
        )
        counts = [processor.num_image_tokens(*size, feature_mode=feature_mode) for size in sizes]
        assert [len(row) for row in tokens] == counts
        assert len(set(counts)) > (2 if fields else 0)


@pytest.mark.parametrize("mode", list(MODES))
def test_encode_takes_a_mode_by_its_name(models, mode):
    """Pins the released sizes themselves, and another mode than the image processor's for one call."""
    page = new_image(60, 700)
    processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode=mode)
    for feature_mode in ("concat", "sequence"):
        (tokens,) = models[feature_mode].encode(page, mode=mode)
        assert len(tokens) == processor.num_image_tokens(60, 700, feature_mode=feature_mode)
    with pytest.raises(ValueError, match="`mode` is 'base'; with preset 'deepseek-ocr-encoder'"):
        models["residual"].encode(page, mode="base")
