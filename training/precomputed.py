"""Training from stored features in place of images.

    pages = precompute_features(pages, llava.model.vision_tower, processor, cache_dir="features")
    with precomputed_features(llava, pages):
        Trainer(llava, arguments, data_collator=FeatureCollator(processor), train_dataset=pages).train()

Letters in the shapes: P images, N tokens of an image, C channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.encoding.encoder import encoder_fingerprint
from deepseek_ocr_vision.training.collator import ImageTextCollator, PaddingSide
from deepseek_ocr_vision.training.features import ReadFeatures


if TYPE_CHECKING:
    import datasets


# The model


@contextmanager
def precomputed_features(model: nn.Module, *pages: "datasets.Dataset") -> Iterator[nn.Module]:
    """Let the encoder inside a composite take its own tokens, computed before, in place of images.

    Inside, `pixel_values` may be tokens [P, N, C], which the encoder hands on as its result; images [P, 3, H, W] are
    encoded as ever. Nothing else changes: the encoder stays where it is, so that what `Trainer` or `save_pretrained`
    write is the whole composite, and it does not compute. Losses are those of training with images as far as the
    stored dtype and the sums of a batch of another size round alike; with mixed precision, the stored tokens are those
    of an encoder outside of it.

    Args:
        model: A LLaVA, or any other module with one encoder of this package in it.
        pages: The datasets to train and evaluate on, as `precompute_features` gave them, at least one.

    Yields:
        The model itself.

    Raises:
        TypeError: No dataset was given, or one has no features.
        ValueError: There is no encoder in the model, or more than one; it is not frozen; it is not the one that
            computed the features; or the composite reads another layer than its last.
    """
    encoder = _encoder_of(model)
    _check_encoder(encoder, pages)
    _check_layer(model)
    replaced = vars(encoder).get("forward")
    # As accelerate's hooks do it: the module stays the one that optimizers, checkpoints and wrappers know.
    encoder.forward = _replaying(encoder, encoder.forward)
    try:
        yield model
    finally:
        del encoder.forward
        if replaced is not None:
            encoder.forward = replaced


def _replaying(encoder: PreTrainedModel, encode: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` that hands tokens on and gives everything else to the one that encodes."""
    width = encoder.config.hidden_size

    def forward(
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling | tuple:
        options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 3:
            return encode(pixel_values, **options, return_dict=return_dict, **kwargs)
        if pixel_values.shape[-1] != width or not pixel_values.is_floating_point():
            given = f"{pixel_values.dtype} {list(pixel_values.shape)}"
            raise ValueError(f"Features have to be floating-point numbers [images, tokens, {width}], got {given}.")
        if output_attentions:
            raise ValueError("`output_attentions` is true, but stored features come without attention weights.")
        tokens = pixel_values.to(encoder.dtype)  # [P, N, C]
        outputs = BaseModelOutputWithPooling(tokens, tokens.mean(dim=1), hidden_states=(tokens,))
        return_dict = encoder.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    return forward


def _encoder_of(model: nn.Module) -> PreTrainedModel:
    """The one encoder inside a model."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type == DeepSeekOCRVisionConfig.model_type
    }
    if len(found) != 1:
        places = f"{len(found)} of them, at {list(found)}" if found else "none"
        raise ValueError(f"`model` has to hold one DeepSeek-OCR encoder; a {type(model).__name__} has {places}.")
    return next(iter(found.values()))


def _check_encoder(encoder: PreTrainedModel, pages: Sequence[Any]) -> None:
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"{len(trained)} tensors of the encoder are trainable, such as {trained[0]!r}, and stored features would "
            "not follow them. Freeze it with `encoder.freeze()`, in a LLaVA `llava.model.vision_tower.freeze()`."
        )
    if not pages:
        raise TypeError("Give the datasets that `precompute_features` returned: precomputed_features(model, pages).")
    fingerprint = encoder_fingerprint(encoder)
    for index, dataset in enumerate(pages):
        if _transform_of(dataset, index).table.settings["encoder"] != fingerprint:
            raise ValueError(
                f"Dataset {index} has features of another encoder than the one in the model, by weights, dtype or "
                "configuration. Compute them by the model's own, in a LLaVA `llava.model.vision_tower`."
            )


def _transform_of(dataset: Any, index: int) -> ReadFeatures:
    transform = getattr(dataset, "format", {}).get("format_kwargs", {}).get("transform")
    if not isinstance(transform, ReadFeatures):
        raise TypeError(
            f"Dataset {index}, a {type(dataset).__name__}, is none that `precompute_features` returned, or lost its "
            "transform since, as by `with_format`."
        )
    return transform


def _check_layer(model: nn.Module) -> None:
    layer = getattr(getattr(model, "config", None), "vision_feature_layer", -1)
    if layer not in (-1, [-1]):
        raise ValueError(f"`vision_feature_layer` of the model is {layer}; only the last layer, -1, is stored.")


# The batches


class FeatureCollator(ImageTextCollator):
    """`ImageTextCollator` for rows with features: `pixel_values` are tokens, and images are passed over.

    Pictures of one number of tokens give `pixel_values` [P, N, C]; of several, as tiles make them, [1, N in all, C],
    which is the same to a LLaVA. A batch without any image gets a blank one in pixels, for `touch_encoder`.

    Args:
        processor: As for `ImageTextCollator`.
        features_column: Name of the column that `precompute_features` added.
        padding_side: As for `ImageTextCollator`.
        touch_encoder: As for `ImageTextCollator`.

    Raises:
        TypeError: As for `ImageTextCollator`.
        ValueError: As for `ImageTextCollator`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        features_column: str = "features",
        padding_side: PaddingSide = "right",
        touch_encoder: bool = True,
    ):
        super().__init__(processor, padding_side=padding_side, touch_encoder=touch_encoder)
        self.processor = _FeatureProcessor(processor)
        self.features_column = features_column

    def __call__(self, samples: Sequence[Mapping[str, Any]], **kwargs) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            samples: Rows of a dataset that `precompute_features` returned, at least one.
            kwargs: Without effect, as for `ImageTextCollator`.

        Returns:
            As `ImageTextCollator` does, with tokens for `pixel_values`.

        Raises:
            TypeError: What a row has for features are no tokens.
            ValueError: As for `ImageTextCollator`, or a row has no column of features.
        """
        return super().__call__([self._with_features(sample, index) for index, sample in enumerate(samples)])

    def _with_features(self, sample: Mapping[str, Any], index: int) -> dict[str, Any]:
        """A row with its features where `ImageTextCollator` looks for images."""
        if self.features_column not in sample:
            raise ValueError(f"Sample {index} of the batch has no {self.features_column!r}; it has {sorted(sample)}.")
        features = sample[self.features_column]
        features = [] if features is None else features if isinstance(features, list) else [features]
        for each in features:
            if not isinstance(each, torch.Tensor) or each.ndim != 2 or not each.is_floating_point():
                raise TypeError(
                    f"Sample {index} of the batch has a {type(each).__name__} under {self.features_column!r} that is "
                    "no floating-point tensor [tokens, channels]. The transform that reads features gets lost by "
                    "`with_format`; call `precompute_features` again, which finds what is stored."
                )
        others = {name: value for name, value in sample.items() if name not in ("image", "images")}
        return others | {"images": features}


class _FeatureProcessor:
    """A processor that takes features [N, C] as well as images, as far as a collator uses one."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.image_token = processor.image_token

    def apply_chat_template(self, *args, **kwargs) -> str:
        return self.processor.apply_chat_template(*args, **kwargs)

    def __call__(self, *, images: list[Any] | None = None, text: list[str], **options) -> BatchFeature:
        features = [image for image in images or [] if isinstance(image, torch.Tensor) and image.ndim == 2]
        if not features:
            return self.processor(**({"images": images} if images else {}), text=text, **options)
        dropped = getattr(self.processor, "vision_feature_select_strategy", "full") == "default"
        counts = iter([len(tokens) - dropped for tokens in features])
        encoded = self.tokenizer([self._expanded(each, counts) for each in text], **options)
        return BatchFeature({**encoded, "pixel_values": _side_by_side(features)})

    def _expanded(self, text: str, counts: Iterator[int]) -> str:
        """A text with as many image tokens as there are tokens of each image."""
        first, *others = text.split(self.image_token)
        return first + "".join(self.image_token * next(counts) + other for other in others)


def _side_by_side(features: list[torch.Tensor]) -> torch.Tensor:
    """The tokens of P images, [P, N, C], or all in a row, [1, N in all, C], if they differ in number."""
    if len({len(tokens) for tokens in features}) == 1:
        return torch.stack(features)
    return torch.cat(features)[None]
