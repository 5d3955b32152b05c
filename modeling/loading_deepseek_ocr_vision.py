"""How the encoder is loaded and saved, and what is said of a checkpoint that does not hold its weights, where
transformers would go on regardless.
"""

import os
from collections.abc import Iterable
from typing import Any, NoReturn, Self

import torch
from transformers import IMAGE_PROCESSOR_MAPPING, AutoImageProcessor
from transformers.utils import cached_file

from ..configuration.configuration_deepseek_ocr_vision import DeepSeekOCRVisionConfig, FeatureMode
from ..configuration.presets_deepseek_ocr_vision import preset_of, require_preset
from ..saving.checkpoint_code_deepseek_ocr_vision import CHECKSUMS, IN_PACKAGE, NEEDS_PACKAGE, checkpoint_code
from ..saving.checksums_deepseek_ocr_vision import verify_checksums as verify_folder
from ..saving.saving_deepseek_ocr_vision import save_atomically
from .base_deepseek_ocr_vision import DeepSeekOCRVisionPreTrainedModel


SHOWN_KEYS = 10

# How the keys of checkpoints that people mistake for this encoder's begin; the first that fits counts.
_LOOKALIKES = {
    "transformers' Unlimited-OCR": ("sam_encoder.", "vision_encoder.encoder.", "model.vision_tower.sam_encoder."),
    "a whole composite around this encoder": ("model.vision_tower.", "vision_tower."),
    "a CLIP model": ("vision_model.encoder.", "text_model.", "visual.", "embeddings.class_embedding"),
    "a segment-anything model": ("image_encoder.", "vision_encoder.layers.", "mask_decoder.", "prompt_encoder."),
    "DeepSeek-OCR-2": ("model.qwen2_model.", "model.vision_tower.vision_encoder.layers."),
    "a language model": ("transformer.h.", "model.layers.", "lm_head."),
}


class CheckpointMixin(DeepSeekOCRVisionPreTrainedModel):
    """Checkpoints of the encoder, in and out: its own, those of whole models, and live encoders."""

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
    ):
        """Load a checkpoint as transformers does, but never go on with random weights under a mere warning.

        Args:
            pretrained_model_name_or_path: A folder, a Hub id, or `None` with a `state_dict` to start from.
            strict: Whether weights that are missing, unknown or of another shape are an error. By default they are,
                save for `None`, and save for a caller who takes the account of them by `output_loading_info`.
            ignore_mismatched_sizes: Whether weights of another shape are drawn anew even so.
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
        if strict is None:
            strict = pretrained_model_name_or_path is not None and not output_loading_info
        _check_files(pretrained_model_name_or_path, kwargs)
        # Pickles can run code.
        kwargs.setdefault("use_safetensors", True)
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            # Shapes are checked below, where the error can name both.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        if strict:
            num_expected = len(model.state_dict())
            check_loading_info(loading_info, num_expected=num_expected, allow_mismatched=ignore_mismatched_sizes)
        if pretrained_model_name_or_path is None:
            # transformers writes the text "None", which would be taken for the name of a repository.
            model.config.name_or_path = model.name_or_path = ""
        if verify_checksums:
            _verify_files(pretrained_model_name_or_path, kwargs)
        return (model, loading_info) if output_loading_info else model

    @classmethod
    def from_deepseek_ocr(
        cls,
        source: str | os.PathLike,
        *,
        preset: str = "deepseek-ocr-encoder",
        feature_mode: FeatureMode | None = None,
        config: DeepSeekOCRVisionConfig | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs,
    ) -> Self:
        """Load the encoder out of a whole DeepSeek-OCR, Unlimited-OCR or LLaVA checkpoint, and nothing else of it.

        Of a repository on the Hub only the vision tensors are fetched, 0.8 of 6.7 GB, and kept in the Hub's cache.
        What was interrupted goes on where it was. Every tensor has to be there, of the right shape and finite.

        Args:
            source: A Hub id such as `"deepseek-ai/DeepSeek-OCR"` or `"baidu/Unlimited-OCR"`, a folder with one or many
                safetensors files, or one such file; in the released layout or that of transformers' Unlimited-OCR.
            preset: Which preprocessing the model will be used with; it decides the feature mode.
            feature_mode: Another mode than the preset's.
            config: The encoder, where the checkpoint is of another size than the released ones and does not say so.
            dtype: What to convert the weights to. By default they stay as they are stored, bfloat16 if released.
            revision: Branch, tag or commit on the Hub.
            token: The Hub's token; by default the one that is logged in.
            cache_dir: The Hub's cache; by default huggingface_hub's own.
            force_download: Whether to fetch again what is in the cache.
            local_files_only: Whether to do without the Hub.
            kwargs: As `from_pretrained` takes them, such as `attn_implementation` or `device_map`.

        Raises:
            TypeError: `source` is no path and no Hub id.
            ValueError: The checkpoint does not fit, is corrupt or holds no safetensors; the message names the keys, or
                the file with the sizes expected and found.
            OSError: It is not there or cannot be fetched; the message names the file, or status and repository.
        """
        mode = require_preset(preset).feature_mode if feature_mode is None else feature_mode
        hub_options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub_options |= {"force_download": force_download, "local_files_only": local_files_only}
        try:
            from deepseek_ocr_vision.weights import load_deepseek_ocr
        except ImportError as error:
            raise ImportError(NEEDS_PACKAGE) from error
        return load_deepseek_ocr(
            cls, source, feature_mode=mode, config=config, dtype=dtype, hub_options=hub_options, **kwargs
        )

    @classmethod
    def from_encoder(cls, encoder: Any, *, copy: bool = False) -> Self:
        """Make a trainable model of a live `deepseek_ocr_encoder.DeepSeekOCREncoder`: the same tokens, and gradients.

        Args:
            encoder: The encoder, of any version of that package; it is recognised by what it carries.
            copy: Whether the model gets weights of its own. By default it shares the encoder's, so that training it
                trains both; all of them require a gradient then. What the encoder has computed of its position table
                in advance does not follow.

        Returns:
            The model in `"residual"` mode, the one whose weights the encoder carries, on its device and in its dtype.

        Raises:
            TypeError: `encoder` is something else.
            ValueError: Its tensors do not fit, are not finite, or were made under `torch.inference_mode()`, which only
                a copy can be trained of.
        """
        try:
            from deepseek_ocr_vision.weights import load_live_encoder
        except ImportError as error:
            raise ImportError(NEEDS_PACKAGE) from error
        return load_live_encoder(cls, encoder, copy=copy)

    def write_deepseek_ocr(
        self,
        base: str | os.PathLike,
        target: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> Any:
        """Write a full checkpoint in the layout of another one, with this model's weights in place of its encoder's.

        Everything else stays byte for byte: the language model, the header of every file, index, configuration,
        tokenizer. Each weight is written in the base's dtype. The target appears in one step, at the end. Memory stays
        below that of the model plus its largest tensor.

        Args:
            base: A DeepSeek-OCR or Unlimited-OCR checkpoint: a folder, a safetensors file or a Hub id, which is
                fetched whole; in the released layout or that of transformers' Unlimited-OCR.
            target: The new folder, or file if the base is one; it must not exist yet, or be an empty folder.
            revision: Branch, tag or commit of a base on the Hub.
            token: The Hub's token; by default the one that is logged in.
            cache_dir: The Hub's cache; by default huggingface_hub's own.

        Returns:
            A report: which tensors were replaced, which of them rounded, which kept the base's values as this feature
            mode does not have them, and which files were not copied. As text it is a short summary.

        Raises:
            ValueError: The base's encoder is not of this model's size, a weight is not finite or does not fit into the
                base's dtype, or adapters are not merged.
            FileExistsError: There is something at `target`.
            OSError: The base cannot be read, the target not be written, or the disk is too small.
        """
        try:
            from deepseek_ocr_vision.weights import write_deepseek_ocr
        except ImportError as error:
            raise ImportError(NEEDS_PACKAGE) from error
        return write_deepseek_ocr(self, base, target, revision=revision, token=token, cache_dir=cache_dir)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Save as transformers does, with the code that loads the folder where this package is not installed.

        An interruption at any point is harmless: see `save_atomically`. Only what all processes write together, with
        `distributed_checkpoint`, goes straight into the folder.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process is the one that writes; the others only take part.
            state_dict: Weights to save in place of the model's own.
            push_to_hub: Whether to upload the folder as well.
            kwargs: As in transformers.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            OSError: The folder cannot be written to, or the disk is full.
        """
        save, kwargs = super().save_pretrained, kwargs | {"is_main_process": is_main_process, "state_dict": state_dict}
        if kwargs.get("distributed_checkpoint"):
            with checkpoint_code(save_directory):
                return save(save_directory, push_to_hub=push_to_hub, **kwargs)
        return save_atomically(self, save, save_directory, publish=is_main_process, push_to_hub=push_to_hub, **kwargs)

    def default_image_processor(self) -> Any:
        """What prepares pictures for this model unless told otherwise.

        Returns:
            The image processor saved with its checkpoint or, where there is none, the preset that belongs to its
            feature mode at `config.image_size`.

        Raises:
            ValueError: Neither is at hand, as in a checkpoint without one whose package is not installed.
        """
        source = self.config.name_or_path
        files = ("preprocessor_config.json", "processor_config.json")
        if source and (not os.path.isdir(source) or any(os.path.isfile(os.path.join(source, file)) for file in files)):
            is_remote_code = type(self).__module__.startswith("transformers_modules.")
            return AutoImageProcessor.from_pretrained(source, trust_remote_code=is_remote_code)
        if type(self.config) not in IMAGE_PROCESSOR_MAPPING:
            raise ValueError("The checkpoint has no image processor; pass one as `image_processor`.")
        registered = IMAGE_PROCESSOR_MAPPING[type(self.config)]
        # transformers keeps a tuple at first, with gaps, and a dictionary by backend later.
        classes = registered.values() if isinstance(registered, dict) else registered
        image_processor_class = next(entry for entry in classes if entry is not None)
        return image_processor_class(preset=preset_of(self.config.feature_mode), size=self.config.image_size)


def check_loading_info(loading_info: dict[str, Any], *, num_expected: int, allow_mismatched: bool) -> None:
    """Refuse a checkpoint that lacks weights, has other shapes, or holds what the model does not know.

    Args:
        loading_info: What transformers' `from_pretrained(output_loading_info=True)` gives.
        num_expected: How many tensors the model has.
        allow_mismatched: Whether tensors of another shape, newly drawn by then, are what the caller asked for.

    Raises:
        ValueError: It names the keys, ten of a kind at the most, and shapes as found and as expected.
    """
    missing, unexpected, mismatched = (
        loading_info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")
    )
    if len(missing) + len(mismatched) == num_expected:
        raise_foreign(unexpected)
    problems = problems_with(missing=missing, unexpected=unexpected, mismatched=[] if allow_mismatched else mismatched)
    if problems:
        raise ValueError(
            f"The checkpoint does not fit the model. {problems}. Pass `strict=False` to load what fits and draw the "
            "rest anew."
        )


def problems_with(
    *, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Iterable, Iterable]]
) -> str:
    """What is wrong with a checkpoint's tensors, in words, ten keys of a kind at the most; nothing if nothing is."""
    missing, unexpected, mismatched = sorted(missing), sorted(unexpected), sorted(mismatched)
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_shown(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are not of this model: {_shown(unexpected)}")
    if mismatched:
        shapes = [f"{key} (found {list(found)}, expected {list(expected)})" for key, found, expected in mismatched]
        problems.append(f"{len(mismatched)} tensors have another shape: {_shown(shapes)}")
    return "; ".join(problems)


def raise_foreign(keys: Iterable[str]) -> NoReturn:
    """Refuse a checkpoint of something else.

    Raises:
        ValueError: It says what the keys look like.
    """
    raise ValueError(f"This is not a DeepSeek-OCR vision checkpoint: {_lookalike(sorted(keys))}.")


def _shown(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN_KEYS} more" if len(items) > SHOWN_KEYS else ""
    return ", ".join(items[:SHOWN_KEYS]) + more


def _lookalike(unexpected: list[str]) -> str:
    if not unexpected:
        return "it holds none of the model's tensors; its keys, if it has any, are those of a language model"
    for name, prefixes in _LOOKALIKES.items():
        if any(key.startswith(prefixes) for key in unexpected):
            return f"its keys look like {name} ({_shown(unexpected[:3])})"
    return f"it holds none of the model's tensors, but {_shown(unexpected)}"


def _check_files(source: str | os.PathLike | None, options: dict[str, Any]) -> None:
    """Find out what is wrong with the files in a folder before transformers stumbles over it."""
    if IN_PACKAGE and source is not None and os.path.isdir(source) and options.get("variant") is None:
        folder = os.path.join(source, options.get("subfolder") or "")
        try:
            from deepseek_ocr_vision.weights import check_files
        except ImportError as error:
            raise ImportError(NEEDS_PACKAGE) from error
        check_files(folder)


def _verify_files(source: str | os.PathLike, options: dict[str, Any]) -> None:
    """Compare a checkpoint's files, in its folder or in the Hub's cache, with its checksums."""
    if source is None:
        raise ValueError("`verify_checksums` is true, but without a checkpoint there are no files to compare.")
    names = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
    checksums = cached_file(source, CHECKSUMS, **{name: options[name] for name in names if name in options})
    verify_folder(os.path.dirname(checksums), allow_missing=not os.path.isdir(source))
