"""The DeepSeek-OCR vision encoder (arXiv 2510.18234) as a transformers model: pixels in, tokens out, gradients back.

Nothing on the way detaches, caches or disables gradients, and a feature mode has only the parameters that it uses, so
a backward pass reaches every weight and every pixel.

Letters in the shapes: B batch, H and W rows and columns of the token grid, N = H x W tokens, C channels.
"""

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import BaseModelOutput

from ..configuration.checks_deepseek_ocr_vision import require_integer, require_whole_tokens
from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig
from ..configuration.presets_deepseek_ocr_vision import ModeName
from .base_deepseek_ocr_vision import LayerGroups, input_device, keep_rng_state, never_emulated
from .clip_deepseek_ocr_vision import ClipEncoder
from .loading_deepseek_ocr_vision import CheckpointMixin
from .sam_deepseek_ocr_vision import SamEncoder
from .sequence_deepseek_ocr_vision import DeepSeekOCRVisionOutput, flatten_views, grids_of_tiles, pad_and_concatenate


if TYPE_CHECKING:
    # Never runs. By these lines older versions of transformers learn which further files a checkpoint travels with.
    from ..saving.saving_deepseek_ocr_vision import AtomicSavingMixin  # noqa: F401
    from .attention_deepseek_ocr_vision import attention_function  # noqa: F401


# What the model reads of what an image processor gives.
INPUTS = ("pixel_values", "pixel_values_local", "num_local_patches", "patches_grid")


class Projector(nn.Module):
    """The released linear map from concatenated features to the width that DeepSeek-OCR's decoder reads."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.layers = nn.Linear(in_features, out_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # [B, N, 2048] -> [B, N, 1280]
        # Quantised layers may hold no weights of a floating-point dtype.
        dtypes = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        with never_emulated(features):
            return self.layers(features.to(next(dtypes, features.dtype)))


class DeepSeekOCRVisionModel(LayerGroups, CheckpointMixin):
    """The encoder: SAM ViT-B, a 16x convolutional compressor, and CLIP-L. A 1024 x 1024 page becomes 256 tokens.

    Parameters are named as in the released checkpoint, less its prefix `model.`, which loading takes off.
    """

    config_class = DeepSeekOCRVisionConfig
    base_model_prefix = "model"
    embeddings_path = "sam_model.patch_embed.proj"
    # What a checkpoint may hold beyond the vision weights of this model's feature mode: the language model around
    # the released encoder, CLIP's unused patch embedding, and what the other feature modes use.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(model\.)?(embed_tokens|layers|norm)\.",
        r"^lm_head\.",
        r"^(model\.)?(image_newline|view_seperator)$",
        r"^(model\.)?projector\.",
        r"^(model\.)?vision_model\.embeddings\.(patch_embedding|class_embedding|position_ids)",
    ]

    def __init__(self, config: DeepSeekOCRVisionConfig):
        config.validate()
        super().__init__(config)
        with_class_token = config.feature_mode != "residual"
        self.sam_model = SamEncoder(config.sam_config, num_channels=config.num_channels)
        self.vision_model = ClipEncoder(config.clip_config, class_token=with_class_token)
        if config.feature_mode in ("projected", "sequence"):
            with keep_rng_state():
                self.projector = Projector(config.concat_size, config.projection_dim)
        if config.feature_mode == "sequence":
            self.image_newline = nn.Parameter(torch.zeros(config.projection_dim))
            self.view_seperator = nn.Parameter(torch.zeros(config.projection_dim))
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_values_local: torch.Tensor | None = None,
        num_local_patches: list[int] | torch.Tensor | None = None,
        patches_grid: list[list[int]] | torch.Tensor | None = None,
        output_hidden_states: bool | int | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DeepSeekOCRVisionOutput | tuple:
        """Encode a batch of pages, with their tiles where there are some: one pass for all pages, one for all tiles.

        Args:
            pixel_values: [B, 3, height, width], normalised; height and width are multiples of `config.patch_size`.
                Cast to the weights' dtype. An empty batch gives an empty batch of tokens.
            pixel_values_local: The tiles of all images, image by image in reading order, [T, 3, S, S] or of any other
                size that `pixel_values` may have; named as in transformers' Unlimited-OCR. Without a tile, [0, 3, S,
                S], a batch takes the same passes as one with tiles, which processes that share weights need.
            num_local_patches: How many of them each image has, B integers.
            patches_grid: Columns and rows of each image's tiles, B x 2 integers; any where there are none.
            output_hidden_states: Whether to return the CLIP stage's hidden states. Composites pass the index of the
                layer that they want, such as -1 or 0, so any integer means yes.
            output_attentions: Whether to return the CLIP stage's attention weights. The CLIP stage then uses the
                `"eager"` attention, whatever its `attn_implementation`.
            return_dict: Whether to return an output object or a tuple.
            kwargs: Without effect. Composites pass on all that they are called with, such as `num_items_in_batch`.

        Returns:
            Tokens, their mean, and what was asked for, as `DeepSeekOCRVisionOutput` says.

        Raises:
            TypeError: `pixel_values` or `pixel_values_local` is no dense tensor of floating-point numbers, or
                `num_local_patches` or `patches_grid` holds no integers.
            ValueError: Either has a wrong shape, pages and tiles do not fit each other, or the model or the pixels
                are on the meta device and the other is not.
        """
        output_hidden_states = _switch(output_hidden_states, default=self.config.output_hidden_states)
        output_attentions = _switch(output_attentions, default=self.config.output_attentions)
        return_dict = _switch(return_dict, default=self.config.return_dict)
        switches = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        self._check_pixel_values("pixel_values", pixel_values)
        if pixel_values_local is not None:
            self._check_pixel_values("pixel_values_local", pixel_values_local)
        grids = grids_of_tiles(num_local_patches, patches_grid, pages=pixel_values, tiles=pixel_values_local)

        pages, of_pages = self._encode_views(pixel_values, **switches)  # [B, H, W, C]
        special_tokens = self._special_tokens(pages)
        if pixel_values_local is None or grids is None:
            last_hidden_state = flatten_views(pages, **special_tokens)  # [B, N, C]
            attention_mask, pooled, of_tiles = None, last_hidden_state.mean(dim=1), BaseModelOutput()
        else:
            tiles, of_tiles = self._encode_views(pixel_values_local, **switches)
            last_hidden_state, attention_mask, pooled = pad_and_concatenate(pages, tiles, grids, **special_tokens)
        hidden_states = of_pages.hidden_states
        outputs = DeepSeekOCRVisionOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            hidden_states=None if hidden_states is None else (*hidden_states[:-1], last_hidden_state),
            attentions=of_pages.attentions,
            attention_mask=attention_mask,
            local_hidden_states=of_tiles.hidden_states,
            local_attentions=of_tiles.attentions,
        )
        return outputs if return_dict else outputs.to_tuple()

    def _encode_views(self, pixel_values: torch.Tensor, **switches: bool) -> tuple[torch.Tensor, BaseModelOutput]:
        """Grids of tokens, [B, H, W, C], of pages or tiles of one size, and all that the CLIP stage gave."""
        feature_map = self.sam_model(pixel_values)  # [B, C, H, W]
        clip_outputs = self.vision_model(feature_map, **switches)
        features = self._features(feature_map, clip_outputs.last_hidden_state)  # [B, N, C]
        return features.unflatten(1, feature_map.shape[-2:]), clip_outputs

    def _features(self, feature_map: torch.Tensor, clip_tokens: torch.Tensor) -> torch.Tensor:
        """Combine both stages' outputs, [B, C, H, W] and [B, N (+ 1), C], as the feature mode says."""
        tokens = feature_map.flatten(2).transpose(1, 2).to(clip_tokens.device)  # [B, N, C]
        if self.config.feature_mode == "residual":
            return tokens + clip_tokens
        features = torch.cat([clip_tokens[:, 1:], tokens], dim=-1)  # [B, N, 2C]: CLIP first, SAM second
        return features if self.config.feature_mode == "concat" else self.projector(features)

    def _special_tokens(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The learned tokens of the released sequence, in the dtype of others; none in other feature modes."""
        if self.config.feature_mode != "sequence":
            return {}
        return {"newline": self.image_newline.to(tokens), "separator": self.view_seperator.to(tokens)}

    def _check_pixel_values(self, name: str, pixel_values: torch.Tensor) -> None:
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(f"`{name}` has to be a torch.Tensor, got a {type(pixel_values).__name__}.")
        if pixel_values.layout != torch.strided or pixel_values.is_nested:
            kind = "a nested one" if pixel_values.is_nested else f"one of layout {pixel_values.layout}"
            raise TypeError(f"`{name}` has to be a dense tensor, got {kind}.")
        if not pixel_values.is_floating_point():
            allowed = "normalised floating-point numbers, as the image processor makes them"
            raise TypeError(f"`{name}` has to hold {allowed}, got {pixel_values.dtype}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            allowed = f"[batch, {self.config.num_channels}, height, width]"
            raise ValueError(f"`{name}` has to be of shape {allowed}, got {list(pixel_values.shape)}.")
        height, width = pixel_values.shape[-2:]
        require_whole_tokens(f"`{name}`", height, width, token_size=self.config.patch_size)

    def encode(
        self, images: Any, *, image_processor: Any = None, mode: ModeName | None = None, batch_size: int = 1
    ) -> list[torch.Tensor]:
        """Turn images into tokens: without gradient, but as ordinary tensors, on which others can be trained.

        Args:
            images: An image or several: paths, PIL images, arrays or tensors, in a list or stacked.
            image_processor: What prepares them. By default the one saved with this checkpoint or, for a model that
                has none, the preset that belongs to its feature mode at `config.image_size`.
            mode: Another of the released model's resolutions than the image processor's, a key of `MODES`.
            batch_size: Images that pass through the model at once, at least 1.

        Returns:
            One tensor [N, config.hidden_size] an image, on the model's device and in its dtype.

        Raises:
            TypeError, ValueError: `images` is empty, an image cannot be read, `batch_size` is no positive integer, or
                the image processor's preset has no such mode.
        """
        batch_size = require_integer("batch_size", batch_size, at_least=1)
        if image_processor is None:
            image_processor = self.default_image_processor()
        images = list(images) if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4 else [images]
        options = {"return_tensors": "pt"} | ({} if mode is None else {"mode": mode})
        tokens: list[torch.Tensor] = []
        with torch.no_grad():
            # An empty list is the image processor's to refuse.
            for start in range(0, max(len(images), 1), batch_size):
                try:
                    features = image_processor(images[start : start + batch_size], **options)
                except (OSError, TypeError, ValueError) as error:
                    _count_from_start(error, start)
                    raise
                inputs = BatchFeature({name: features[name] for name in INPUTS if name in features})
                outputs = self(**inputs.to(input_device(self)), return_dict=True)
                rows, mask = outputs.last_hidden_state, outputs.attention_mask
                tokens.extend(rows if mask is None else [row[own] for row, own in zip(rows, mask, strict=True)])
        return tokens

    def layer_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters in groups, from the pixels to the tokens: one list for freezing and for learning-rate decay.

        Returns:
            Name to parameters, in the order of the data: `sam.patch_embed`, `sam.blocks.0` and on, `sam.neck`,
            `sam.compressor`, `clip.embeddings`, `clip.layers.0` and on, `projector` where there is one, and `sequence`
            with the learned tokens of that feature mode. Every parameter is in exactly one group.
        """
        sam, clip = self.sam_model, self.vision_model
        groups = {
            "sam.patch_embed": _parameters(sam, "patch_embed", "pos_embed"),
            **{f"sam.blocks.{index}": [*block.parameters()] for index, block in enumerate(sam.blocks)},
            "sam.neck": _parameters(sam, "neck"),
            "sam.compressor": _parameters(sam, "net_2", "net_3"),
            "clip.embeddings": _parameters(clip, "embeddings", "pre_layrnorm"),
            **{f"clip.layers.{index}": [*each.parameters()] for index, each in enumerate(clip.transformer.layers)},
        }
        if self.config.feature_mode in ("projected", "sequence"):
            groups["projector"] = _parameters(self, "projector")
        if self.config.feature_mode == "sequence":
            groups["sequence"] = _parameters(self, "image_newline", "view_seperator")
        return groups


def _switch(value: Any, *, default: Any) -> bool:
    """An optional switch as a bool. Composites pass a layer's index, and index 0 means yes, so no test for truth."""
    value = default if value is None else value
    return value is not None and value is not False


def _count_from_start(error: Exception, start: int) -> None:
    """Let an error about an image of a batch name its index in the whole list."""
    counted = partial(re.sub, r"(?<=\bimages\[)\d+(?=\])", lambda match: str(int(match[0]) + start))
    error.args = tuple(counted(part) if isinstance(part, str) else part for part in error.args)


def _parameters(module: nn.Module, *names: str) -> list[nn.Parameter]:
    """The parameters of some children of a module, or of its own by these names, parametrised ones too."""
    paths = tuple(f"{place}{name}." for name in names for place in ("", "parametrizations."))
    return [parameter for path, parameter in module.named_parameters() if f"{path}.".startswith(paths)]
