"""The processor, the Auto classes, folders that load without this package, and transformers' `LlavaProcessor`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoImageProcessor, AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionProcessor


@pytest.fixture
def page() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))


def image_processor() -> DeepSeekOCRVisionImageProcessor:
    return DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=(128, 192), do_pad=True)


# The processor


def test_the_processor_gives_what_its_image_processor_gives(page, tmp_path):
    """Options that are merged on the way, as `ProcessorMixin` does, get lost with no more than a warning."""
    processor = DeepSeekOCRVisionProcessor(image_processor())
    page.save(tmp_path / "page.png")
    for options in ({}, {"size": 64}, {"images_kwargs": {"size": 64}}, {"common_kwargs": {"do_normalize": False}}):
        flat = options.get("images_kwargs", options.get("common_kwargs", options))
        expected = image_processor()(page, return_tensors="pt", **flat).pixel_values
        for images in (page, [tmp_path / "page.png"]):
            pixels = processor(images=images, return_tensors="pt", **options).pixel_values
            torch.testing.assert_close(pixels, expected, rtol=0, atol=0)


def test_the_processor_refuses_what_it_cannot_use(page):
    """Text that is ignored in silence gives a batch without `input_ids`, found much later."""
    processor = DeepSeekOCRVisionProcessor(image_processor())
    with pytest.raises(ValueError, match=r"LlavaProcessor\(.*patch_size=64.*'full'"):
        processor(images=page, text="<image>")
    with pytest.raises(ValueError, match="`images` is None"):
        processor()
    with pytest.raises(TypeError, match="has no max_length"):
        processor(images=page, max_length=3)
    with pytest.raises(ValueError, match=r"\['size'\] are given twice"):
        processor(images=page, size=64, images_kwargs={"size": 128})
    with pytest.raises(TypeError, match="image_processor"):
        DeepSeekOCRVisionProcessor("deepseek-ocr")


def test_the_processor_is_built_without_arguments_too():
    """transformers' common tests, and people, build it so."""
    processor = DeepSeekOCRVisionProcessor()
    assert processor.image_processor.to_dict() == DeepSeekOCRVisionImageProcessor().to_dict()
    assert processor.model_input_names[0] == "pixel_values"


# Folders and Auto classes


@pytest.mark.parametrize("saver", ["image processor", "processor"])
@pytest.mark.parametrize("with_model", [False, True])
def test_both_auto_classes_load_what_either_saved(saver, with_model, tmp_path):
    """Without a model beside it, nothing but its own JSON says what class a preprocessor is of."""
    processor = DeepSeekOCRVisionProcessor(image_processor())
    fields = processor.image_processor.to_dict(), processor.to_dict()
    if with_model:
        DeepSeekOCRVisionConfig().save_pretrained(tmp_path)
    (processor if saver == "processor" else processor.image_processor).save_pretrained(tmp_path)
    assert (processor.image_processor.to_dict(), processor.to_dict()) == fields, "saving changes what is saved"
    image_part, whole = AutoImageProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(image_part) is DeepSeekOCRVisionImageProcessor
    assert type(whole) is DeepSeekOCRVisionProcessor
    assert image_part.to_dict() == fields[0]
    assert whole.to_dict() == fields[1]
    assert repr(whole) == repr(processor)


def test_a_model_without_a_saved_processor_gets_none_by_guess(tmp_path):
    """The class is known by the config, but the preset is not."""
    DeepSeekOCRVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="preprocessor_config"):
        AutoImageProcessor.from_pretrained(tmp_path)


ALONE = """
import json, os, sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepseek_ocr_vision":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, NotInstalled())
from transformers import AutoImageProcessor, AutoProcessor

source, target = sys.argv[1:]
report = {}
for folder in sorted(os.listdir(source)):
    for auto_class in (AutoImageProcessor, AutoProcessor):
        loaded = auto_class.from_pretrained(os.path.join(source, folder), trust_remote_code=True)
        name = f"{folder}-{auto_class.__name__}"
        report[name] = [type(loaded).__module__.split(".")[0], type(loaded).__name__, loaded.to_dict()]
        loaded.save_pretrained(os.path.join(target, name))
print(json.dumps(report))
"""


def load_alone(source, target, modules) -> dict:
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE, str(source), str(target)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_folder_loads_where_the_package_is_not_installed_and_so_does_its_copy(tmp_path):
    """A file that the folder does not carry is missed only on somebody else's machine, or at the second save."""
    image_processor().save_pretrained(tmp_path / "first" / "image")
    DeepSeekOCRVisionProcessor(image_processor()).save_pretrained(tmp_path / "first" / "whole")
    first = load_alone(tmp_path / "first", tmp_path / "second", tmp_path / "modules 1")
    second = load_alone(tmp_path / "second", tmp_path / "third", tmp_path / "modules 2")
    assert len(first) == 4
    assert len(second) == 8
    for name, (package, class_name, fields) in (first | second).items():
        is_whole = name.endswith("AutoProcessor")
        assert package == "transformers_modules"
        assert class_name == ("DeepSeekOCRVisionProcessor" if is_whole else "DeepSeekOCRVisionImageProcessor")
        assert (fields["image_processor"] if is_whole else fields) == json.loads(image_processor().to_json_string())


# LlavaProcessor


@pytest.fixture
def llava() -> LlavaProcessor:
    words = {"<pad>": 0, "<image>": 1, "read": 2, "this": 3}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(image_processor(), tokenizer, patch_size=64, vision_feature_select_strategy="full")


def test_llava_puts_as_many_placeholders_as_the_model_gives_tokens(llava, page, tmp_path):
    """One placeholder more or less, and the composite refuses the batch."""
    page.save(tmp_path / "page.png")
    texts = ["<image> read this", "read <image> this"]
    array = np.array(page)
    for images in ([page, array], [[page], [array]], [str(tmp_path / "page.png"), array]):
        batch = llava(images=images, text=texts, return_tensors="pt", padding=True)
        assert batch.pixel_values.shape == (2, 3, 128, 192)
        counts = (batch.input_ids == llava.image_token_id).sum(dim=1).tolist()
        assert counts == [llava.image_processor.num_image_tokens(40, 70)] * 2 == [6, 6]
    expected = image_processor()([page, page], return_tensors="pt").pixel_values
    torch.testing.assert_close(batch.pixel_values, expected, rtol=0, atol=0)


def test_what_the_tokenizer_was_built_with_does_not_reach_the_image_processor(llava):
    """transformers offers it whatever it has a field of the same name for; a tokenizer of 5.23 has a `backend`."""
    shared = set(llava.tokenizer.init_kwargs) & set(llava.image_processor.valid_kwargs.__annotations__)
    assert not shared, shared


def test_llava_counts_by_the_size_of_the_call(llava, page):
    """The image processor's own size then is not the one that counts."""
    batch = llava(images=page, text="<image> read", images_kwargs={"size": 64}, return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 64, 64)
    assert (batch.input_ids == llava.image_token_id).sum() == 1


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older LlavaProcessor does not compare the number of images with that of placeholders; the model does",
)
def test_llava_refuses_more_or_fewer_images_than_placeholders(llava, page):
    """Every image after the missing one would be read for the text of another."""
    for images, text in (([page, page], "<image> read"), ([page], "<image> <image>"), (None, "<image>")):
        with pytest.raises(ValueError, match="<image>"):
            llava(images=images, text=text)


def test_llava_counts_ahead_of_time(llava):
    """transformers asks the image processor for a `crop_size`, which one that crops nothing does not have."""
    counted = llava._get_num_multimodal_tokens(image_sizes=[(40, 70), (1, 1)])
    assert counted.num_image_tokens == [llava.image_processor.num_image_tokens(40, 70)] * 2


def test_llava_opens_files_and_downloads_nothing(llava, tmp_path):
    """transformers' image processors fetch whatever URL a data set holds."""
    with pytest.raises(ValueError, match=r"images\[0\].*is a URL"):
        llava(images=["https://localhost:1/page.png"], text=["<image>"])
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        llava(images=[str(tmp_path / "missing.png")], text=["<image>"])


def test_llava_with_our_image_processor_survives_a_folder(llava, page, tmp_path):
    """It carries no code of ours, so it must not say that it does."""
    llava.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "processor_config.json").read_text()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaProcessor
    assert loaded.image_processor.to_dict() == llava.image_processor.to_dict()
    batches = [one(images=page, text="<image> read", return_tensors="pt") for one in (llava, loaded)]
    assert torch.equal(batches[0].pixel_values, batches[1].pixel_values)
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
