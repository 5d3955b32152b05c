"""How the encoder is loaded and saved. What concerns checkpoints of others is in the package's `weights`."""

import os
from collections.abc import Iterable
from typing import Any, Self

from safetensors import SafetensorError
from transformers import AutoImageProcessor
from transformers.utils import CONFIG_NAME, cached_file

from ..configuration.checks_deepseek_ocr_vision import list_some
from ..configuration.configuration_deepseek_ocr_vision import FeatureMode
from ..configuration.presets_deepseek_ocr_vision import require_preset
from ..saving.saving_deepseek_ocr_vision import IN_PACKAGE, NEEDS_PACKAGE, AtomicSavingMixin
from .base_deepseek_ocr_vision import DeepSeekOCRVisionPreTrainedModel


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class Origin(dict):
    """Where a model was loaded from, as arguments of `from_pretrained`. Copies and pickles leave the token out."""

    __repr__ = object.__repr__

    def __reduce__(self) -> tuple:
        return Origin, ({name: value for name, value in self.items() if name != "token"},)


class CheckpointMixin(AtomicSavingMixin, DeepSeekOCRVisionPreTrainedModel):
    """Checkpoints of the encoder, in and out."""

    _origin: Origin | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        strict: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        verify_checksums: bool = False,
        **kwargs,
    ) -> Self:
        """Load a checkpoint as transformers does, but never go on with random weights under a mere warning.

        Args:
            pretrained_model_name_or_path: A folder, a Hub id, or `None` with a `state_dict` to start from.
            strict: Whether weights that are missing, unknown or of another shape are an error. By default they are,
                except for `None`, and for a caller who asks for them by `output_loading_info`.
            ignore_mismatched_sizes: Whether weights of another shape are newly initialised instead.
            output_loading_info: Whether to return transformers' dictionary of missing and other keys as well.
            verify_checksums: Whether to compare the files with the SHA-256 sums that a converted or published
                checkpoint holds, which takes some seconds a gigabyte.
            model_args: As in transformers.
            kwargs: As in transformers.

        Raises:
            ValueError: The checkpoint does not fit, is corrupt, or is not what its checksums say; the message names
                keys and shapes, or files.
            OSError: The checkpoint cannot be read, holds no safetensors, or has no checksums though they were to be
                compared.
        """
        source = pretrained_model_name_or_path
        if strict is None:
            strict = source is not None and not output_loading_info
        # Pickles can run code.
        kwargs.setdefault("use_safetensors", True)
        if IN_PACKAGE and source is not None:
            kwargs = _weights().check_before_loading(
                cls, source, strict=strict, allow_mismatched=ignore_mismatched_sizes, options=kwargs
            )
        try:
            loaded: Any = super().from_pretrained(
                source,
                *model_args,
                # Shapes are checked below, where the error can name both.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(f"{source}: a safetensors file is corrupt ({error}); fetch it again.") from error
        model, loading_info = loaded
        if strict:
            check_loading_info(loading_info, allow_mismatched=ignore_mismatched_sizes)
        if source is None:
            # transformers writes the text "None", which would be taken for the name of a repository.
            model.config.name_or_path = model.name_or_path = ""
        else:
            model._origin = _origin_of(source, kwargs)
        if verify_checksums:
            _weights().verify_loaded(source, **_hub_options(kwargs))
        return (model, loading_info) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def from_deepseek_ocr(
        cls,
        source: str | os.PathLike,
        *,
        preset: str = "deepseek-ocr-encoder",
        feature_mode: FeatureMode | None = None,
        **kwargs,
    ) -> Self:
        """Load the encoder out of a whole DeepSeek-OCR, Unlimited-OCR or LLaVA checkpoint, and nothing else of it.

        Of a repository on the Hub only the encoder's tensors are fetched, 0.8 of 6.7 GB, and kept in the Hub's cache.

        Args:
            source: A Hub id such as `"deepseek-ai/DeepSeek-OCR"` or `"baidu/Unlimited-OCR"`, a folder with one or many
                safetensors files, or one such file; in the released layout or that of transformers.
            preset: Which preprocessing the model will be used with, a key of `PRESETS`; it decides the feature mode.
            feature_mode: Another feature mode than the preset's.
            kwargs: `dtype`, what to convert the weights to, `"auto"` for nothing; by default nothing, but float32 on a
                processor without products in theirs; `verify_checksums`, whether to compare what is on this machine
                with its `SHA256SUMS`; `config`, the encoder, where its size is not the released one and the checkpoint
                does not say so; the Hub's `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`;
                and what `from_pretrained` takes.

        Returns:
            The model in `eval()`. Every parameter requires a gradient.

        Raises:
            TypeError: `source` is no path and no Hub id.
            ValueError: A tensor is missing, of another shape or not finite, or a file is corrupt, no safetensors or
                not what its checksums say; the message names keys and shapes, or the file.
            OSError: It is not there or cannot be fetched; the message names the file, or status and repository.
        """
        feature_mode = require_preset(preset).feature_mode if feature_mode is None else feature_mode
        return _weights().load_deepseek_ocr(cls, source, feature_mode=feature_mode, **kwargs)

    @classmethod
    def from_encoder(cls, encoder: Any, *, copy: bool = False) -> Self:
        """Make a trainable model of a live `deepseek_ocr_encoder.DeepSeekOCREncoder`: the same tokens, and gradients.

        Args:
            encoder: The encoder, of any version of that package.
            copy: Whether the model gets weights of its own. By default it shares the encoder's, so that training it
                trains both.

        Returns:
            The model in feature mode `"residual"`, in `eval()`, on the encoder's device and in its dtype.

        Raises:
            TypeError: `encoder` is something else.
            ValueError: Its tensors do not fit, are not finite, or can only be trained as a copy.
        """
        return _weights().load_live_encoder(cls, encoder, copy=copy)

    def write_deepseek_ocr(self, base: str | os.PathLike, target: str | os.PathLike, **hub_options: Any) -> Any:
        """Write a copy of a whole checkpoint with this encoder's weights in place of its own.

        All else stays byte for byte: language model, index, configuration, tokenizer, and what this feature mode does
        not have. Each weight is written in the base's dtype. The target appears by one rename, at the end.

        Args:
            base: A DeepSeek-OCR or Unlimited-OCR: a folder, a safetensors file or a Hub id, which is fetched whole; in
                the released layout or that of transformers. Where it has `SHA256SUMS`, they are compared first.
            target: The new folder, or file if the base is one; it must not exist yet, or be an empty folder.
            hub_options: `revision`, `token` and `cache_dir` of a base on the Hub.

        Returns:
            A `WriteReport` of what was replaced, rounded to the base's dtype, kept, and left out.

        Raises:
            ValueError: The base's encoder is not of this model's size, the base is not what its checksums say, a
                weight is not finite or does not fit into the base's dtype, or adapters are not merged.
            FileExistsError: There is something at `target`.
            OSError: The base cannot be read, the target not be written, or the disk is too small.
        """
        return _weights().write_deepseek_ocr(self, base, target, **hub_options)

    def default_image_processor(self) -> Any:
        """What prepares images for this model: the image processor saved where it was loaded from or, where there is
        none, the preset of its feature mode at `config.image_size`. That needs the package, or is a `ValueError`.
        """
        if self._origin is not None and _may_hold_image_processor(self._origin):
            is_remote_code = type(self).__module__.startswith("transformers_modules.")
            return AutoImageProcessor.from_pretrained(**self._origin, trust_remote_code=is_remote_code)
        try:
            return _weights().default_image_processor(self.config)
        except ImportError as error:
            raise ValueError("The checkpoint has no image processor; pass one as `image_processor`.") from error


def _weights() -> Any:
    """What of loading and saving stays in the package."""
    try:
        from deepseek_ocr_vision import weights
    except ImportError as error:
        raise ImportError(NEEDS_PACKAGE) from error
    return weights


def check_loading_info(loading_info: dict[str, Any], *, allow_mismatched: bool) -> None:
    """Refuse a checkpoint by what transformers' `from_pretrained(output_loading_info=True)` says of it."""
    problems = problems_with(
        missing=loading_info["missing_keys"],
        unexpected=loading_info["unexpected_keys"],
        mismatched=[] if allow_mismatched else loading_info["mismatched_keys"],
    )
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the model. {problems}. Pass `strict=False` to load what fits and newly "
            "initialise the rest."
        )


def problems_with(
    *, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Iterable, Iterable]]
) -> str:
    """What is wrong with a checkpoint's tensors, in words, ten keys of a kind at the most; nothing if nothing is."""
    shapes = [f"{key} (found {list(found)}, expected {list(expected)})" for key, found, expected in sorted(mismatched)]
    kinds = {"are missing": sorted(missing), "are not of this model": sorted(unexpected), "have another shape": shapes}
    return "; ".join(f"{len(keys)} tensors {are}: {list_some(keys)}" for are, keys in kinds.items() if keys)


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
    return {name: options[name] for name in names if options.get(name) is not None}


def _origin_of(source: str | os.PathLike, options: dict[str, Any]) -> Origin | None:
    """Where a model that was just loaded came from; of a Hub id the commit, as a branch may move on."""
    if os.path.isfile(source):
        return None
    origin = Origin(_hub_options(options))
    if os.path.isdir(source):
        return Origin(origin, pretrained_model_name_or_path=os.path.abspath(source))
    try:
        config: Any = cached_file(source, CONFIG_NAME, **(origin | {"local_files_only": True}))
    except OSError:
        return Origin(origin, pretrained_model_name_or_path=source)
    folder = os.path.dirname(config).removesuffix(options.get("subfolder") or "").rstrip("/\\")
    return Origin(origin, pretrained_model_name_or_path=source, revision=os.path.basename(folder))


def _may_hold_image_processor(origin: Origin) -> bool:
    """Whether a folder holds an image processor. Of a repository on the Hub loading tells."""
    folder = os.path.join(origin["pretrained_model_name_or_path"], origin.get("subfolder", ""))
    return not os.path.isdir(folder) or any(os.path.isfile(os.path.join(folder, file)) for file in _PROCESSOR_FILES)
