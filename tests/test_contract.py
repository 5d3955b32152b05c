"""The places where transformers calls this package: a keyword that a later release adds must do no harm there."""

import inspect

import pytest
import torch
import transformers
from helpers import pixels, run_python, tiny_config
from PIL import Image
from tiny_composites import (
    inputs,
    tiling_processor,
    tiny_dual_encoder,
    tiny_encoder_decoder,
    tiny_llava,
    tiny_tiling_llava,
)
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, Trainer, TrainingArguments, pipeline
from transformers.processing_utils import ImagesKwargs
from transformers.utils.generic import TransformersKwargs

from deepseek_ocr_vision import (
    DeepSeekOCRVisionConfig,
    DeepSeekOCRVisionImageProcessor,
    DeepSeekOCRVisionModel,
    DeepSeekOCRVisionProcessor,
    FeatureCollator,
    ImageTextCollator,
)
from deepseek_ocr_vision.composites import build_processor
from deepseek_ocr_vision.training.features import _replaying


LATER = {"keyword_of_a_later_release": torch.tensor(1)}


def page() -> Image.Image:
    return Image.new("RGB", (128, 128), (9, 99, 200))


# What is called with tensors


def test_forward_of_the_model_and_of_both_stages_takes_keywords_of_a_later_release(tiny_model):
    """Pins LLaVA in transformers 5.24, which hands all of its keyword arguments on to its tower."""
    expected = tiny_model(pixels()).last_hidden_state
    assert torch.equal(tiny_model(pixels(), **LATER).last_hidden_state, expected)
    feature_map = tiny_model.sam_model(pixels(), **LATER)
    assert torch.equal(feature_map, tiny_model.sam_model(pixels()))
    assert tiny_model.vision_model(feature_map, **LATER).last_hidden_state.shape == (2, 4, 32)


def test_stored_tokens_take_keywords_of_a_later_release(tiny_model):
    """Pins the `forward` that stands in for the encoder's while its stored tokens are trained on."""
    forward = _replaying(tiny_model, tiny_model.forward)
    tokens = torch.randn(2, 4, 32)
    assert torch.equal(forward(tokens, **LATER).last_hidden_state, tokens)
    assert torch.equal(forward(pixels(), **LATER).last_hidden_state, tiny_model(pixels()).last_hidden_state)


@pytest.mark.parametrize("collator", [ImageTextCollator, FeatureCollator])
def test_collators_take_keywords_of_a_later_release(collator):
    """Pins `return_tensors`, with which transformers' own collators are called, and what may follow it."""
    processor = build_processor(page_size=128)
    column = {"image": page()} if collator is ImageTextCollator else {"features": torch.randn(4, 32)}
    batch = collator(processor)([{"text": "<image>a"} | column], return_tensors="pt", **LATER)
    assert len(batch["pixel_values"]) == 1


# Composites in `Trainer`

KEYWORDS = dict.fromkeys(TransformersKwargs.__annotations__) | {
    "cu_seq_lens_q": torch.tensor([0, 7]),
    "cu_seq_lens_k": torch.tensor([0, 7]),
    "max_length_q": 7,
    "max_length_k": 7,
    "num_items_in_batch": torch.tensor(6),
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
}


class HandingOnTrainer(Trainer):
    """Calls the model with every keyword that this transformers declares for a `forward`, as far as the model does."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        keywords = {name: value for name, value in KEYWORDS.items() if takes_any or name in parameters}
        return super().compute_loss(model, keywords | inputs, *args, **kwargs)


def tiling_batch() -> dict[str, torch.Tensor]:
    return ImageTextCollator(tiling_processor())([{"prompt": "<image>", "answer": "a", "image": page()}])


COMPOSITES = {
    "LLaVA": (lambda: tiny_llava(), lambda: inputs(1) | {"labels": inputs(1)["input_ids"]}),
    "LlavaNext": (lambda: tiny_tiling_llava("LlavaNext", "residual"), tiling_batch),
    "LlavaOnevision": (lambda: tiny_tiling_llava("LlavaOnevision", "residual"), tiling_batch),
    "dual encoder": (
        lambda: tiny_dual_encoder("residual"),
        lambda: {"input_ids": torch.tensor([[1, 2], [3, 4]]), "pixel_values": pixels(2), "return_loss": True},
    ),
    "encoder and decoder": (
        lambda: tiny_encoder_decoder("residual"),
        lambda: {"labels": torch.tensor([[1, 2, 3]]), "pixel_values": pixels(1)},
    ),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_composite_trains_with_every_keyword_that_transformers_declares(name, tmp_path):
    """Pins `make finetune` under transformers 5.24, which stopped at its first step; two steps of `Trainer`."""
    make_model, make_batch = COMPOSITES[name]
    model, batch = make_model(), make_batch()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = HandingOnTrainer(model, arguments, train_dataset=[{}] * 2, data_collator=lambda rows: dict(batch))
    assert trainer.train().training_loss > 0
    (name,) = [name for name in before if name.endswith("sam_model.net_3.weight")]
    assert not torch.equal(dict(model.named_parameters())[name], before[name])


# What is called with images


@pytest.mark.parametrize("name", sorted(ImagesKwargs.__annotations__))
def test_the_image_processor_takes_what_transformers_declares(name):
    """Pins names that transformers hands to any image processor, `None` where the caller has not said."""
    image_processor = DeepSeekOCRVisionImageProcessor(size=128)
    expected = image_processor(page(), return_tensors="pt")["pixel_values"]
    options = {"return_tensors": "pt"} | ({} if name == "return_tensors" else {name: None})
    assert torch.equal(image_processor(page(), **options)["pixel_values"], expected)
    processor = DeepSeekOCRVisionProcessor(image_processor)
    assert torch.equal(processor(images=page(), **options)["pixel_values"], expected)


@pytest.mark.parametrize("name", ["crop_size", "default_to_square", "do_center_crop", "image_seq_length", "pad_size"])
def test_what_an_image_processor_has_not_is_without_effect(name):
    """Pins composites that hand on the fields of another image processor."""
    if name not in ImagesKwargs.__annotations__:
        pytest.skip(f"transformers {transformers.__version__} does not declare {name}")
    image_processor = DeepSeekOCRVisionImageProcessor(size=128)
    expected = image_processor(page(), return_tensors="pt")["pixel_values"]
    assert torch.equal(image_processor(page(), return_tensors="pt", **{name: 3})["pixel_values"], expected)
    assert torch.equal(
        DeepSeekOCRVisionImageProcessor(size=128, **{name: 3})(page(), return_tensors="pt")["pixel_values"], expected
    )


def test_a_pipeline_encodes():
    """Pins transformers' own pipeline, which calls image processor and model in its own way."""
    model, image_processor = DeepSeekOCRVisionModel(tiny_config()).eval(), DeepSeekOCRVisionImageProcessor(size=128)
    extract = pipeline("image-feature-extraction", model=model, image_processor=image_processor, device="cpu")
    expected = model.encode(page(), image_processor=image_processor)[0]
    assert torch.allclose(torch.tensor(extract(page())[0]), expected)


# Files


def test_files_of_a_later_version_load(tmp_path):
    """Pins fields that this version does not know, in every JSON file of a checkpoint."""
    later = {"field_of_a_later_version": [1, 2]}
    config = DeepSeekOCRVisionConfig.from_dict(tiny_config().to_dict() | later)
    config.sam_config = type(config.sam_config).from_dict(config.sam_config.to_dict() | later)
    DeepSeekOCRVisionModel(config).save_pretrained(tmp_path)
    image_processor = DeepSeekOCRVisionImageProcessor(size=128)
    image_processor.field_of_a_later_version = [1, 2]
    DeepSeekOCRVisionProcessor(image_processor).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).field_of_a_later_version == [1, 2]
    assert AutoModel.from_pretrained(tmp_path).config.sam_config.field_of_a_later_version == [1, 2]
    assert AutoImageProcessor.from_pretrained(tmp_path).field_of_a_later_version == [1, 2]
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.size == {"height": 128, "width": 128}


def test_saving_and_loading_take_keywords_of_a_later_release(tmp_path):
    """Pins the overrides of transformers' own methods: what they do not know goes on to these."""
    saved = [
        tiny_config(),
        DeepSeekOCRVisionModel(tiny_config()),
        DeepSeekOCRVisionImageProcessor(size=128),
        DeepSeekOCRVisionProcessor(DeepSeekOCRVisionImageProcessor(size=128)),
    ]
    for index, each in enumerate(saved):
        folder = tmp_path / str(index)
        each.save_pretrained(folder, **LATER)
        if not isinstance(each, DeepSeekOCRVisionModel):
            # transformers' own models refuse keywords for their `__init__` that they do not know.
            assert type(type(each).from_pretrained(folder, **LATER)) is type(each)


# The name


NATIVE = """
    from transformers import CLIPVisionConfig, CLIPVisionModel, AutoConfig, AutoModel
    class NativeConfig(CLIPVisionConfig):
        model_type = "{name}"
    class NativeModel(CLIPVisionModel):
        config_class = NativeConfig
    NativeConfig.__module__ = NativeModel.__module__ = "transformers.models.deepseek_ocr.modeling_deepseek_ocr"
    AutoConfig.register("{name}", NativeConfig)
    AutoModel.register(NativeConfig, NativeModel)
"""


@pytest.mark.parametrize("name", ["deepseek_ocr_vision", "deepseek_ocr_vision_encoder"])
def test_a_native_class_of_transformers_never_gets_this_package_s_checkpoints(tmp_path, name):
    """Pins transformers' own DeepSeek-OCR: ours took over its name in silence, or it ours, with new weights."""
    DeepSeekOCRVisionModel(tiny_config()).save_pretrained(tmp_path)
    output = run_python(
        NATIVE.format(name=name)
        + f"""
    try:
        import deepseek_ocr_vision
        print(type(AutoModel.from_pretrained("{tmp_path}")).__name__)
        print(AutoConfig.for_model("{name}").__class__.__name__)
    except ImportError as error:
        print("ImportError", error)
        """
    )
    if name == "deepseek_ocr_vision":
        assert output.split() == ["DeepSeekOCRVisionModel", "NativeConfig"]
    else:
        assert "ImportError transformers" in output
        assert "newer deepseek-ocr-vision" in output


@pytest.mark.parametrize("options", ["", ", trust_remote_code=True"])
def test_without_the_package_a_native_class_under_the_old_name_is_not_used(tmp_path, options):
    """Pins a folder of ours where only transformers is installed: our class by its own code, or an error."""
    DeepSeekOCRVisionModel(tiny_config()).save_pretrained(tmp_path)
    output = run_python(
        NATIVE.format(name="deepseek_ocr_vision")
        + f"""
    try:
        print(type(AutoModel.from_pretrained("{tmp_path}"{options})).__name__)
    except ValueError as error:
        print("ValueError", error)
        """,
        package_installed=False,
        HF_MODULES_CACHE=str(tmp_path.parent / "modules"),
    )
    if options:
        assert output.strip() == "DeepSeekOCRVisionModel"
    else:
        assert "ValueError" in output
        assert "trust_remote_code" in output
