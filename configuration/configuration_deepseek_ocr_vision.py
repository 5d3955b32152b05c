"""What an encoder is: the configuration of the DeepSeek-OCR vision encoder and of its two stages.

The architecture is that of the DeepSeek-OCR paper (arXiv 2510.18234): a SAM ViT-B reads the page in 16-pixel
patches, two strided convolutions compress its grid 4 x 4 to 1, and a CLIP-L transformer reads the result.
"""

import os
from typing import Any, ClassVar, Literal, TypeVar, get_args

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..saving.saving_deepseek_ocr_vision import IN_PACKAGE, NEEDS_PACKAGE, AtomicSavingMixin
from .checks_deepseek_ocr_vision import require_choice, require_integer, require_number


FeatureMode = Literal["residual", "concat", "projected", "sequence"]
FEATURE_MODES: tuple[str, ...] = get_args(FeatureMode)
Stage = TypeVar("Stage", bound=PreTrainedConfig)


class _ValidatedConfig(PreTrainedConfig):
    """A configuration that is validated when built and again when loaded, and refuses another `model_type`."""

    field_prefix: ClassVar[str] = ""

    def __init__(self, **kwargs):
        self._require_model_type(kwargs.pop("model_type", self.model_type))
        if IN_PACKAGE:
            _at_home().require_common_fields(kwargs)
        super().__init__(**kwargs)
        self.validate()

    @classmethod
    def _require_model_type(cls, model_type: Any) -> None:
        if model_type != cls.model_type:
            allowed = f"{cls.model_type!r} for a {cls.__name__}"
            raise ValueError(f"`model_type` is {model_type!r}; it has to be {allowed}.")

    def _require(self, field: str, condition: bool, allowed: str) -> None:
        """What a field has to be besides a value of its type."""
        if not condition:
            raise ValueError(f"`{self.field_prefix}{field}` is {getattr(self, field)!r}; it has to be {allowed}.")

    def _require_integers(self, *fields: str) -> None:
        for field in fields:
            setattr(self, field, require_integer(f"{self.field_prefix}{field}", getattr(self, field), at_least=1))

    def _require_list(self, field: str, *, at_least: int, at_most: int | None = None) -> None:
        name, values = f"{self.field_prefix}{field}", getattr(self, field)
        if not isinstance(values, list | tuple):
            raise TypeError(f"`{name}` is {values!r}; it has to be a list of integers.")
        limits = {"at_least": at_least, "at_most": at_most}
        setattr(self, field, [require_integer(f"{name}[{i}]", value, **limits) for i, value in enumerate(values)])

    def _require_transformer(self) -> None:
        """What both stages' transformers need."""
        self._require_integers("hidden_size", "num_hidden_layers", "num_attention_heads")
        for field in ("layer_norm_eps", "initializer_range"):
            setattr(self, field, require_number(f"{self.field_prefix}{field}", getattr(self, field), above=0))
        heads_divide_width = self.hidden_size % self.num_attention_heads == 0
        self._require("num_attention_heads", heads_divide_width, f"a divisor of hidden_size ({self.hidden_size})")
        require_choice(f"{self.field_prefix}hidden_act", self.hidden_act, sorted(ACT2FN))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build the configuration from a dictionary, as `transformers` does, but strictly."""
        if not isinstance(config_dict, dict):
            raise TypeError(f"A {cls.__name__} is read from a dictionary, got a {type(config_dict).__name__}.")
        cls._require_model_type(config_dict.get("model_type", cls.model_type))
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.validate()
        return result


class DeepSeekOCRVisionSamConfig(_ValidatedConfig):
    """The SAM ViT-B stage with its neck and its 16x compressor. Errors are those of a `DeepSeekOCRVisionConfig`.

    Args:
        hidden_size: Width of a patch, in channels.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Heads of each block; a divisor of `hidden_size`.
        mlp_dim: Hidden width of each block's MLP.
        patch_size: Side of a patch in pixels.
        window_size: Side of an attention window in patches.
        global_attn_indexes: Blocks that attend to the whole grid instead of windows, each below `num_hidden_layers`.
        output_channels: Width of the neck.
        downsample_channels: Widths of the compressor's two strided convolutions.
        image_size: Side in pixels of the square page that the position tables are laid out for.
        hidden_act: Activation of the MLPs, a key of `transformers.activations.ACT2FN`.
        layer_norm_eps: Epsilon of every layer norm of the stage.
        initializer_range: Standard deviation of the normal distribution that a new model's weights come from.
    """

    model_type = "deepseek_ocr_vision_sam"
    base_config_key = "sam_config"
    field_prefix = "sam_config."

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_dim: int = 3072,
        patch_size: int = 16,
        window_size: int = 14,
        global_attn_indexes: list[int] | tuple[int, ...] = (2, 5, 8, 11),
        output_channels: int = 256,
        downsample_channels: list[int] | tuple[int, int] = (512, 1024),
        image_size: int = 1024,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_dim = mlp_dim
        self.patch_size = patch_size
        self.window_size = window_size
        self.global_attn_indexes = global_attn_indexes
        self.output_channels = output_channels
        self.downsample_channels = downsample_channels
        self.image_size = image_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def token_size(self) -> int:
        """Side in pixels of the square that one compressed token stands for."""
        return self.patch_size * 2 ** len(self.downsample_channels)

    def validate(self) -> None:
        """Raise an error that names the first field whose type or value is not allowed."""
        self._require_transformer()
        self._require_integers("mlp_dim", "patch_size", "window_size", "output_channels", "image_size")
        self._require_list("global_attn_indexes", at_least=0, at_most=self.num_hidden_layers - 1)
        self._require_list("downsample_channels", at_least=1)
        self._require("downsample_channels", len(self.downsample_channels) == 2, "a list of two integers")
        allowed = f"a multiple of {self.token_size} (patch_size x the compressor's 4)"
        self._require("image_size", self.image_size % self.token_size == 0, allowed)


class DeepSeekOCRVisionClipConfig(_ValidatedConfig):
    """The CLIP-L stage, which reads the compressed grid. Errors are those of a `DeepSeekOCRVisionConfig`.

    Args:
        hidden_size: Width of a token, in channels.
        intermediate_size: Hidden width of each layer's MLP.
        num_hidden_layers: Number of transformer layers.
        num_attention_heads: Heads of each layer; a divisor of `hidden_size`.
        grid_size: Side, in tokens, of the square grid that the position table is laid out for.
        hidden_act: Activation of the MLPs, a key of `transformers.activations.ACT2FN`.
        layer_norm_eps: Epsilon of every layer norm of the stage.
        initializer_range: Standard deviation of the normal distribution that a new model's weights come from.
    """

    model_type = "deepseek_ocr_vision_clip"
    base_config_key = "clip_config"
    field_prefix = "clip_config."

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        grid_size: int = 16,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.grid_size = grid_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    def validate(self) -> None:
        """Raise an error that names the first field whose type or value is not allowed."""
        self._require_transformer()
        self._require_integers("intermediate_size", "grid_size")


class DeepSeekOCRVisionConfig(AtomicSavingMixin, _ValidatedConfig):
    """The whole encoder: a SAM stage, a CLIP stage, and what is made of their outputs.

    Args:
        sam_config: The SAM stage, as an object or a dictionary of its fields. Defaults to SAM ViT-B.
        clip_config: The CLIP stage, as an object or a dictionary of its fields. Defaults to CLIP-L.
        image_size: Side in pixels of the square page that the encoder is meant for. Any height and width that are
            multiples of `patch_size` can be encoded. Defaults to the SAM stage's.
        patch_size: Side in pixels of the square that one *token* stands for, so that `(image_size // patch_size) ** 2`
            counts tokens. It follows from the SAM stage (patch x compressor, 16 x 4 = 64), and defaults to that.
        num_channels: Colour channels of the pixels.
        feature_mode: What the tokens are. `"residual"`: `tokens + CLIP(tokens)`, without a class token, as the package
            `deepseek-ocr-encoder` computes. `"concat"`: `concat(CLIP(tokens), tokens)`, as the released model.
            `"projected"`: the same after the released linear projector. `"sequence"`: that again as the released
            decoder reads it, with a learned token at the end of each row of the grid and one at the end of an image.
        projection_dim: Width after the projector, for `"projected"` and `"sequence"`.

    Attributes:
        hidden_size: Width of the tokens (1024, 2048 or `projection_dim`, by feature mode). Derived, read-only.

    Raises:
        TypeError: A field has a value of another type; the message names the field.
        ValueError: A field has a value that is not allowed, or two do not fit; the message names the field.
    """

    model_type = "deepseek_ocr_vision_encoder"
    base_config_key = "vision_config"
    sub_configs: ClassVar = {"sam_config": DeepSeekOCRVisionSamConfig, "clip_config": DeepSeekOCRVisionClipConfig}
    code_entries: ClassVar = ("AutoConfig", "AutoModel")

    def __init__(
        self,
        sam_config: DeepSeekOCRVisionSamConfig | dict | None = None,
        clip_config: DeepSeekOCRVisionClipConfig | dict | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        num_channels: int = 3,
        feature_mode: FeatureMode = "residual",
        projection_dim: int = 1280,
        **kwargs,
    ):
        stated_hidden_size = kwargs.pop("hidden_size", None)
        if IN_PACKAGE:
            kwargs.pop("auto_map", None)
        self.sam_config = _as_config("sam_config", sam_config, DeepSeekOCRVisionSamConfig)
        self.clip_config = _as_config("clip_config", clip_config, DeepSeekOCRVisionClipConfig)
        self.image_size = self.sam_config.image_size if image_size is None else image_size
        self.patch_size = self.sam_config.token_size if patch_size is None else patch_size
        self.num_channels = num_channels
        self.feature_mode = feature_mode
        self.projection_dim = projection_dim
        super().__init__(**kwargs)
        if stated_hidden_size not in (None, self.hidden_size):
            allowed = f"{self.hidden_size}, the width of feature_mode {self.feature_mode!r}: leave it out"
            raise ValueError(f"`hidden_size` is {stated_hidden_size!r}; it has to be {allowed}.")

    @classmethod
    def tiny(cls, **fields) -> "DeepSeekOCRVisionConfig":
        """An encoder for tests and first steps, of 2 + 2 layers and width 32: 128 x 128 pixels are 2 x 2 tokens.

        Args:
            fields: Fields to replace. A dictionary for a stage replaces those fields of the stage that it names.
        """
        return cls(**_at_home().tiny_fields(fields))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Read the file, as transformers does, and refuse a whole model's, and what is no object."""
        read = super().get_config_dict
        if not IN_PACKAGE:
            return read(pretrained_model_name_or_path, **kwargs)
        return _at_home().read_config_dict(read, pretrained_model_name_or_path, **kwargs)

    @property
    def concat_size(self) -> int:
        """Width of both stages' tokens side by side, which the projector reads."""
        return self.clip_config.hidden_size + self.sam_config.downsample_channels[-1]

    @property
    def hidden_size(self) -> int:
        """Width of the tokens that come out; composites size their projector by it."""
        require_choice("feature_mode", self.feature_mode, FEATURE_MODES)
        widths = {"residual": self.clip_config.hidden_size, "concat": self.concat_size}
        return widths.get(self.feature_mode, self.projection_dim)

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        # NotImplementedError is what transformers' own configs raise for a common property that has no setter.
        raise NotImplementedError("`hidden_size` follows from `feature_mode` and the two stages; set those instead.")

    def validate(self) -> None:
        """Raise an error that names the first field whose type or value is not allowed, nested ones included."""
        self.sam_config.validate()
        self.clip_config.validate()
        self._require_integers("image_size", "patch_size", "num_channels", "projection_dim")
        require_choice("feature_mode", self.feature_mode, FEATURE_MODES)
        token_size = self.sam_config.token_size
        allowed = f"{token_size}, the pixels a token (sam_config.patch_size x the compressor's 4)"
        self._require("patch_size", self.patch_size == token_size, allowed)
        self._require("image_size", self.image_size % token_size == 0, f"a multiple of patch_size ({token_size})")
        width = self.clip_config.hidden_size
        allowed = f"a list that ends in clip_config.hidden_size ({width}): CLIP reads those channels"
        self.sam_config._require("downsample_channels", self.sam_config.downsample_channels[-1] == width, allowed)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary, the derived `hidden_size` among them for readers of the JSON."""
        return super().to_dict() | {"hidden_size": self.hidden_size}


def _at_home() -> Any:
    """What of the configuration stays in the package."""
    try:
        from deepseek_ocr_vision.configuration import at_home
    except ImportError as error:
        raise ImportError(NEEDS_PACKAGE) from error
    return at_home


def _as_config(field: str, value: Any, config_class: type[Stage]) -> Stage:
    if value is None:
        return config_class()
    if isinstance(value, dict):
        return config_class.from_dict(dict(value))
    if not isinstance(value, config_class):
        raise TypeError(f"`{field}` has to be a dict or a {config_class.__name__}, got a {type(value).__name__}.")
    return value
