"""The whole of DeepSeek-OCR (arXiv 2510.18234): this package's encoder, a projector and the language model, trainable.

The language model and what joins it to the images are transformers' Unlimited-OCR classes, which compute DeepSeek-OCR
with DeepSeek-OCR's weights. The vision tower is the encoder of this package in feature mode `"concat"`, so that
gradients reach every weight and every pixel. What DeepSeek's own code adds in training, the loss that balances the
experts, is added here.

Importing this registers the classes with `AutoConfig` and `AutoModelForImageTextToText`, and the names of the released
checkpoint, in which transformers loads and saves.
"""

import os
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, NoRepeatNGramLogitsProcessor
from transformers.utils import can_return_tuple

from deepseek_ocr_vision.composites.deepseek_ocr_weights import WriteReport, check_whole, load_whole, write_whole
from deepseek_ocr_vision.configuration import DeepSeekOCRVisionConfig
from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import (
    require_choice,
    require_integer,
    require_number,
)
from deepseek_ocr_vision.modeling import DeepSeekOCRVisionModel
from deepseek_ocr_vision.modeling.base_deepseek_ocr_vision import LayerGroups
from deepseek_ocr_vision.modeling.loading_deepseek_ocr_vision import problems_with
from deepseek_ocr_vision.weights.repository import HUB_OPTIONS
from deepseek_ocr_vision.weights.sizes import read_config_of


try:
    from transformers import (
        UnlimitedOcrConfig,
        UnlimitedOcrForConditionalGeneration,
        UnlimitedOcrModel,
        UnlimitedOcrTextConfig,
        UnlimitedOcrTextModel,
    )
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
except ImportError as error:
    raise ImportError(
        "The whole DeepSeek-OCR needs transformers 5.21 or newer, which has the classes of Unlimited-OCR; "
        f"{transformers.__version__} is installed."
    ) from error


FEATURE_MODE = "concat"
"""The vision tower's feature mode: the projector and the special tokens belong to the model around it."""


class DeepSeekOCRConfig(UnlimitedOcrConfig):
    """Encoder, projector and language model.

    Attributes:
        vision_config: The encoder, as a `DeepSeekOCRVisionConfig` in feature mode `"concat"` or a dictionary of its
            fields. Defaults to the released sizes.
        text_config: The language model, as transformers' `UnlimitedOcrTextConfig` or a dictionary of its fields. From
            a dictionary that names neither `layer_types` nor `sliding_window` every layer attends to all earlier
            tokens, as DeepSeek-OCR does. An `UnlimitedOcrTextConfig` is taken as it is: its default, a window of 128
            tokens, is that of Unlimited-OCR.
        image_token_id: Id of the token that stands for one token of an image.
        aux_loss_alpha: Weight of the loss that balances the experts in training, at least 0. The released model was
            trained with 0.001, the default.
        tie_word_embeddings: Whether the language model's output shares its input's embeddings. The released one's does
            not.

    Raises:
        ValueError: A field has a value that is not allowed; the message names the field.
    """

    model_type = "deepseek_ocr_full"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": DeepSeekOCRVisionConfig,
        "text_config": UnlimitedOcrTextConfig,
    }

    aux_loss_alpha: float = 0.001
    if TYPE_CHECKING:  # what they are once the configuration is built, which the annotations of its base do not say
        vision_config: Any
        text_config: Any

    def __post_init__(self, **kwargs: Any):
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = {"feature_mode": FEATURE_MODE} | (self.vision_config or {})
        if self.text_config is None or isinstance(self.text_config, dict):
            self.text_config = _attending_to_everything(self.text_config or {})
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        vision, text = self.vision_config, self.text_config
        require_choice("vision_config.feature_mode", vision.feature_mode, [FEATURE_MODE])
        require_integer("image_token_id", self.image_token_id, at_least=0, at_most=text.vocab_size - 1)
        require_number("aux_loss_alpha", self.aux_loss_alpha, at_least=0)
        if self.aux_loss_alpha and text.topk_method != "greedy":
            raise ValueError(
                f"`text_config.topk_method` is {text.topk_method!r}; with an `aux_loss_alpha` it has to be 'greedy'."
            )


def _attending_to_everything(text_config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a language model whose layers attend to all earlier tokens, unless the fields say otherwise.

    `sliding_window` cannot be `None`, and says nothing where no layer has a window.
    """
    if "layer_types" in text_config or text_config.get("sliding_window") is not None:
        return dict(text_config)
    defaults = UnlimitedOcrTextConfig()
    num_layers = text_config.get("num_hidden_layers", defaults.num_hidden_layers)
    window = text_config.get("max_position_embeddings", defaults.max_position_embeddings)
    return text_config | {"layer_types": ["full_attention"] * num_layers, "sliding_window": window}


class DeepSeekOCRModel(UnlimitedOcrModel):
    """transformers' `UnlimitedOcrModel` with this package's encoder as its vision tower.

    Args:
        config: The model.
    """

    config_class = DeepSeekOCRConfig
    config: DeepSeekOCRConfig
    _no_split_modules = ["SamBlock", "ClipLayer", "UnlimitedOcrTextDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: DeepSeekOCRConfig):
        # The base of `UnlimitedOcrModel`, which would build a vision tower of its own from another configuration.
        super(UnlimitedOcrModel, self).__init__(config)
        width = config.text_config.hidden_size
        self.vocab_size = config.text_config.vocab_size
        self.vision_tower: Any = DeepSeekOCRVisionModel(config.vision_config)
        self.multi_modal_projector = nn.Linear(config.vision_config.hidden_size, width)
        self.language_model = UnlimitedOcrTextModel(config.text_config)
        self.view_separator = nn.Parameter(torch.zeros(width))
        self.image_newline = nn.Parameter(torch.zeros(width))
        self.post_init()

    @wraps(UnlimitedOcrModel.get_image_features)
    def get_image_features(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if pixel_values.ndim == 4 and pixel_values.shape[-2] != pixel_values.shape[-1]:
            # transformers arranges the tokens by the square root of their number.
            raise ValueError(f"`pixel_values` is of shape {list(pixel_values.shape)}; pages have to be square.")
        return super().get_image_features(pixel_values, *args, **kwargs)


class DeepSeekOCRForConditionalGeneration(LayerGroups, UnlimitedOcrForConditionalGeneration):
    """DeepSeek-OCR: images and a prompt in, text out, and gradients back to every weight and every pixel.

    Forward, generation and outputs are those of transformers' `UnlimitedOcrForConditionalGeneration`. In training the
    gradients of `loss` hold those of the loss that balances the experts as well, as in DeepSeek's own code;
    `config.aux_loss_alpha` says how much of it, and the number that `loss` shows is without it, as there.

    Args:
        config: The model.
    """

    config_class = DeepSeekOCRConfig
    config: DeepSeekOCRConfig
    _no_split_modules = DeepSeekOCRModel._no_split_modules

    def __init__(self, config: DeepSeekOCRConfig):
        super(UnlimitedOcrForConditionalGeneration, self).__init__(config)
        self.model = DeepSeekOCRModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @wraps(UnlimitedOcrForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if not self.training or labels is None or not self.config.aux_loss_alpha:
            outputs = super().forward(*args, **kwargs, return_dict=True)
            if not hasattr(outputs, "aux_loss"):
                outputs.aux_loss = None  # transformers 5.21 has no such field
            return outputs
        kwargs["output_router_logits"] = True
        outputs = super().forward(*args, **kwargs, return_dict=True)
        if outputs.router_logits:
            input_ids = args[0] if args else kwargs.get("input_ids")
            balance = self._balance(outputs.router_logits, input_ids, labels, kwargs.get("attention_mask"))
            outputs.aux_loss = balance * _part_of_step(labels, kwargs.get("num_items_in_batch"))
            # In the gradients and not in the number.
            outputs.loss = outputs.loss + (outputs.aux_loss - outputs.aux_loss.detach())
        return outputs

    def _balance(
        self,
        router_logits: tuple[torch.Tensor, ...],
        input_ids: torch.Tensor | None,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weighted load-balancing loss of a batch."""
        _require_router_gradients(self, router_logits)
        counted = torch.ones_like(labels, dtype=torch.bool)
        if input_ids is not None and attention_mask is not None and attention_mask.shape == input_ids.shape:
            # Padding counts, as in DeepSeek's code, but not the masked image that a batch without images has.
            counted = ~((input_ids == self.config.image_token_id) & (attention_mask == 0))
        num_chosen = self.config.text_config.num_experts_per_tok
        return self.config.aux_loss_alpha * load_balancing_loss(router_logits, counted, num_chosen=num_chosen)

    def layer_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters in groups, from the pixels to the text: one list for freezing and for learning-rate decay.

        Returns:
            Name to parameters, in the order of the data: the encoder's (`sam.patch_embed` to `clip.layers.23`),
            `projector`, `sequence` with the two learned tokens, `language_model.embed_tokens`,
            `language_model.layers.0` and on, and `language_model.head` with the last norm. Every parameter is in
            exactly one group, save where output and input embeddings are tied.
        """
        model, language_model = self.model, self.model.language_model
        groups = model.vision_tower.layer_groups()
        groups["projector"] = [*model.multi_modal_projector.parameters()]
        groups["sequence"] = [model.image_newline, model.view_separator]
        groups["language_model.embed_tokens"] = [*language_model.embed_tokens.parameters()]
        for index, layer in enumerate(language_model.layers):
            groups[f"language_model.layers.{index}"] = [*layer.parameters()]
        groups["language_model.head"] = [*language_model.norm.parameters(), *self.lm_head.parameters()]
        return groups

    @classmethod
    def from_deepseek_ocr(
        cls,
        source: str | os.PathLike,
        *,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | dict[str, str] | None = None,
        **options: Any,
    ) -> "DeepSeekOCRForConditionalGeneration":
        """Load a whole DeepSeek-OCR or Unlimited-OCR: in the released layout, or as transformers saves it.

        Every tensor has to be there, of the right shape and finite, and there may be none that is not known; where
        the folder has checksums, they are compared. In memory are the weights and one tensor more.

        Args:
            source: A Hub id such as `"deepseek-ai/DeepSeek-OCR"` or `"baidu/Unlimited-OCR"`, which is fetched whole, a
                folder with one or many safetensors files, or one such file; also what `save_pretrained` of this class
                wrote.
            dtype: What to convert the weights to, `"auto"` for as they are stored, bfloat16 if released. By default
                that too, but float32, and twice the memory, where there is no accelerator and the processor has no
                products in bfloat16. The routers are in float32 always, as in transformers.
            attn_implementation: As in transformers.
            options: The Hub's `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, and fields of
                `DeepSeekOCRConfig` in place of what the checkpoint says: `aux_loss_alpha`, or `image_token_id` where
                neither its configuration nor its tokenizer tells.

        Returns:
            The model in `eval()`, on the CPU. Every parameter requires a gradient.

        Raises:
            TypeError: `source` is no path and no Hub id.
            ValueError: The checkpoint does not fit, is corrupt, or holds no safetensors; the message names the keys,
                or the file with the sizes expected and found.
            OSError: It is not there or cannot be fetched; the message names the file, or status and repository.
        """
        model = load_whole(cls, source, dtype=dtype, **options)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model

    def write_deepseek_ocr(
        self, base: str | os.PathLike, target: str | os.PathLike, **hub_options: Any
    ) -> WriteReport:
        """Write a checkpoint in the layout of another one, with this model's weights in place of all of its own.

        What serves the base serves the result: shards, index, configuration, code and tokenizer are the base's, byte
        for byte, and each weight is written in the base's dtype. CLIP's patch embedding, which nothing uses, keeps the
        base's values. The target appears in one step, at the end.

        Args:
            base: A whole DeepSeek-OCR or Unlimited-OCR: a folder, a safetensors file or a Hub id, which is fetched
                whole; in the released layout or that of transformers' Unlimited-OCR.
            target: The new folder, or file if the base is one; it must not exist yet, or be an empty folder.
            hub_options: `revision`, `token` and `cache_dir` of a base on the Hub.

        Returns:
            A report: which tensors were replaced, which of them rounded, which kept the base's values, and which files
            were not copied. As text it is a short summary.

        Raises:
            ValueError: The base is not of this model's size, a weight is not finite or does not fit into the base's
                dtype, or adapters are not merged (`merge_and_unload()` of peft's model merges them).
            FileExistsError: There is something at `target`.
            OSError: The base cannot be read, the target not be written, or the disk is too small.
        """
        return write_whole(self, base, target, **hub_options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load what `save_pretrained` wrote, as transformers does, but never go on with newly initialised weights.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id, or `None` with a `config` and a `state_dict`.
            model_args: As in transformers.
            ignore_mismatched_sizes: Whether weights of another shape are initialised anew, as for another vocabulary.
            output_loading_info: Whether to return transformers' dictionary of missing and other keys as well; then
                nothing about the keys is an error.
            kwargs: As in transformers.

        Raises:
            ValueError: It is a checkpoint of another kind, such as a released one, which `from_deepseek_ocr` loads;
                or weights are missing, unknown or of another shape. The message names them.
            OSError: The checkpoint cannot be read.
        """
        kwargs.setdefault("use_safetensors", True)
        if pretrained_model_name_or_path is not None:
            contents = _own_config(pretrained_model_name_or_path, kwargs)
            lenient = ignore_mismatched_sizes or output_loading_info
            kwargs = check_whole(
                cls, pretrained_model_name_or_path, contents, allow_mismatched=lenient, options=kwargs
            )
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            # Shapes are checked below, where the error can name both.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        model, info = loaded
        if output_loading_info:
            return model, info
        mismatched = [] if ignore_mismatched_sizes else info["mismatched_keys"]
        problems = problems_with(
            missing=info["missing_keys"], unexpected=info["unexpected_keys"], mismatched=mismatched
        )
        if problems:
            raise ValueError(f"{pretrained_model_name_or_path} does not fit the model. {problems}.")
        return model


class NoRepeatNGram(NoRepeatNGramLogitsProcessor):
    """Keeps `generate` from writing the same n tokens twice: `generate(..., logits_processor=[NoRepeatNGram(20)])`.

    DeepSeek's own `infer` runs the released model so, with 20 tokens and no window. A window lets long tables repeat
    their cells while short loops still end.

    Args:
        ngram_size: Length in tokens of what is not repeated, at least 1.
        window_size: How many tokens back a repetition counts, at least `ngram_size`; all, the prompt's among them, if
            `None`.

    Raises:
        ValueError: Either is not such a number.
    """

    def __init__(self, ngram_size: int, window_size: int | None = None):
        super().__init__(ngram_size)
        if window_size is not None and (type(window_size) is not int or window_size < ngram_size):
            raise ValueError(f"`window_size` is {window_size!r}; it has to be None or at least {ngram_size}.")
        self.window_size = window_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] with minus infinity where a token would complete a repetition; `input_ids` [B, L]."""
        return super().__call__(input_ids if self.window_size is None else input_ids[:, -self.window_size :], scores)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], counted: torch.Tensor, *, num_chosen: int
) -> torch.Tensor:
    """How unevenly the experts are used, summed over the layers: 1 a layer where all are used alike, more otherwise.

    The sequence-wise loss of DeepSeek-V2 (arXiv 2405.04434, section 2.2.3), as DeepSeek's own code computes it: of
    each row, the sum over the experts of the share of choices, in units of an even share, times the mean score.

    Args:
        router_logits: What each layer's router gives, [B x L, E].
        counted: Which tokens count, bool [B, L], at least one of each row.
        num_chosen: Experts that a token is given to.
    """
    losses = []
    for logits in router_logits:
        scores = logits.float().softmax(dim=-1).view(*counted.shape, -1)  # [B, L, E]
        weights = (counted / counted.sum(dim=1, keepdim=True)).to(scores)[..., None]  # [B, L, 1], of each row 1 in all
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(num_chosen, dim=-1).indices, 1.0)
        share = (chosen * weights).sum(dim=1) * (scores.shape[-1] / num_chosen)  # [B, E]
        losses.append((share * (scores * weights).sum(dim=1)).sum(dim=1).mean())
    return torch.stack(losses).sum()


def _part_of_step(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """The part of a training step that a batch is, by which the loss of it is weighted where steps accumulate."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / num_items_in_batch


def _require_router_gradients(model: nn.Module, router_logits: tuple[torch.Tensor, ...]) -> None:
    """Refuse reentrant checkpointing, in which router logits lose their gradients, and the loss of them its effect."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    has_trained_router = any(name.endswith(".mlp.gate.weight") for name in trained)
    if has_trained_router and torch.is_grad_enabled() and not any(logits.requires_grad for logits in router_logits):
        raise ValueError(
            "With `use_reentrant` true, gradient checkpointing cuts the load-balancing loss off. Use "
            '`gradient_checkpointing_kwargs={"use_reentrant": False}`, or set `config.aux_loss_alpha` to 0.'
        )


def _own_config(source: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's configuration says, which has to be of this model's kind."""
    config = options.get("config")
    if isinstance(config, DeepSeekOCRConfig):
        return config.to_dict()
    hub_options = {name: options[name] for name in (*HUB_OPTIONS, "subfolder") if name in options}
    contents = read_config_of(source if config is None else config, **hub_options)
    model_type = contents.get("model_type")
    if model_type != DeepSeekOCRConfig.model_type:
        raise ValueError(
            f"{source} is a checkpoint of the kind {model_type!r}, not {DeepSeekOCRConfig.model_type!r}. A released "
            "DeepSeek-OCR or Unlimited-OCR is loaded by `DeepSeekOCRForConditionalGeneration.from_deepseek_ocr`."
        )
    return contents


# What transformers calls its modules, from the names of the released checkpoint, in which it loads and saves them.
_RENAMES = {
    r"^model\.sam_model\.": "model.vision_tower.sam_model.",
    r"^model\.vision_model\.": "model.vision_tower.vision_model.",
    r"^model\.projector\.layers\.": "model.multi_modal_projector.",
    r"^model\.view_seperator": "model.view_separator",
    r"^model\.embed_tokens\.": "model.language_model.embed_tokens.",
    r"^model\.layers\.": "model.language_model.layers.",
    r"^model\.norm\.": "model.language_model.norm.",
}

register_checkpoint_conversion_mapping(
    DeepSeekOCRConfig.model_type,
    [WeightRenaming(pattern, replacement) for pattern, replacement in _RENAMES.items()],
    overwrite=True,
)
AutoConfig.register(DeepSeekOCRConfig.model_type, DeepSeekOCRConfig, exist_ok=True)
AutoModelForImageTextToText.register(DeepSeekOCRConfig, DeepSeekOCRForConditionalGeneration, exist_ok=True)
