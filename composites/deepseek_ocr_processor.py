"""What the whole DeepSeek-OCR reads: pages in the modes tiny to gundam, with a prompt each.

The released model has no chat template. Its input is the beginning-of-sequence token and the prompt as it is given,
with the tokens of the image in the place of `<image>`; `prompts.prompt_of` makes the prompts of the released `infer`.
"""

import math
import os
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from deepseek_ocr_vision.composites.deepseek_ocr import DeepSeekOCRConfig
from deepseek_ocr_vision.composites.prompts import IMAGE_TOKEN
from deepseek_ocr_vision.configuration.presets_deepseek_ocr_vision import ModeName
from deepseek_ocr_vision.processing import DeepSeekOCRVisionImageProcessor
from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import TOKEN_SIZE
from deepseek_ocr_vision.processing.images_deepseek_ocr_vision import named_images
from deepseek_ocr_vision.weights.repository import HUB_OPTIONS, local_checkpoint


class DeepSeekOCRProcessor(ProcessorMixin):
    """Turns images and texts into the inputs of a `DeepSeekOCRForConditionalGeneration`.

    `processor(images=..., text=..., return_tensors="pt")` gives `input_ids` and `attention_mask`, [B, L], and what the
    image processor gives. A text holds `<image>` once for each of its images; the images are those of all texts in
    order. Texts without images may stand anywhere between the others. Each text gets the beginning-of-sequence token
    in front, unless it begins with it or `add_special_tokens` is false.

    For training, `ImageTextCollator(processor)` makes batches with labels.

    Args:
        image_processor: A `DeepSeekOCRVisionImageProcessor` of the preset `"deepseek-ocr"`; its mode decides how many
            tokens an image has.
        tokenizer: The language model's, with `<image>` as a single token.
        chat_template: A template in Jinja for conversations, which the released model has not.
        kwargs: As `ProcessorMixin` takes them.

    Raises:
        ValueError: The tokenizer has no token `<image>`.
    """

    skip_tensor_conversion = ["video_metadata", "text_replacement_offsets", "num_local_patches", "patches_grid"]  # noqa: RUF012

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ):  # loading hands on what is named here
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"The tokenizer has no token {IMAGE_TOKEN!r}; add it as a special token first.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_deepseek_ocr(
        cls,
        source: str | os.PathLike,
        *,
        mode: ModeName = "gundam",
        **options: Any,
    ) -> "DeepSeekOCRProcessor":
        """Make the processor that goes with `DeepSeekOCRForConditionalGeneration.from_deepseek_ocr`.

        Args:
            source: A Hub id, or a folder with the tokenizer.
            mode: One of the released model's resolutions: `"tiny"`, `"small"`, `"base"`, `"large"` or `"gundam"`.
            options: The Hub's `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, and further
                arguments of the image processor, such as `max_patches`, or `size` in place of a mode.

        Raises:
            OSError: There is no tokenizer, or it cannot be fetched.
            ValueError: It has no `<image>`, or a field has a value that is not allowed.
        """
        hub_options = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        folder = local_checkpoint(source, "source", patterns=("*.json", "*.txt", "*.model"), **hub_options)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{source} has no tokenizer.json; it is no whole DeepSeek-OCR.")
        # The class that takes tokenizer.json as it is. The one that the released configuration names is Llama's, which
        # newer transformers build anew, with Llama's way of splitting text.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        resolution = {} if "size" in options else {"mode": mode}
        return cls(DeepSeekOCRVisionImageProcessor("deepseek-ocr", **(resolution | options)), tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare texts and their images.

        Args:
            images: An image or a list of them, as `DeepSeekOCRVisionImageProcessor` takes them.
            text: A text or a list of them.
            **kwargs: What tokenizer and image processor take for one call: `mode`, `padding`, `return_tensors`, ...

        Raises:
            TypeError: A text is no string, or an argument is not known.
            ValueError: There is no text, the images are not as many as the `<image>` in the texts, or one cannot be
                read.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts:
            raise ValueError(f"`text` is {text!r}; give a text or a list of texts.")
        for entry in texts:
            if not isinstance(entry, str):
                raise TypeError(f"`text` holds a {type(entry).__name__}; it has to hold strings.")
        if kwargs.pop("add_special_tokens", True):
            beginning = self.tokenizer.bos_token or ""
            texts = [entry if entry.startswith(beginning) else beginning + entry for entry in texts]
        images = None if isinstance(images, list | tuple) and not images else images
        num_tokens = sum(entry.count(self.image_token) for entry in texts)
        num_images = 0 if images is None else len(list(named_images(images, "images")))
        if num_tokens != num_images:
            raise ValueError(f"The texts hold {num_tokens} {self.image_token}, and there are {num_images} images.")
        return super().__call__(images=images, text=texts, add_special_tokens=False, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """As many `<image>` as the model has tokens for an image: with the special tokens, and tiles first."""
        views = [[side // TOKEN_SIZE for side in image_inputs["pixel_values"][image_idx].shape[-2:]]]
        if image_inputs.get("num_local_patches", [0] * (image_idx + 1))[image_idx]:
            columns, rows = image_inputs["patches_grid"][image_idx]
            height, width = (side // TOKEN_SIZE for side in image_inputs["pixel_values_local"][0].shape[-2:])
            views.append([rows * height, columns * width])
        return self.image_token * (1 + sum(height * (width + 1) for height, width in views))

    def num_placeholders(self, num_tokens: int) -> int:
        """As many `<image>` as there are for a page of some tokens of the encoder, without tiles.

        Raises:
            ValueError: They are no square page's.
        """
        side = math.isqrt(num_tokens)
        if side**2 != num_tokens:
            raise ValueError(
                f"{num_tokens} tokens are no square page's; those of tiles cannot be stored for this model."
            )
        return side * (side + 1) + 1


AutoProcessor.register(DeepSeekOCRConfig, DeepSeekOCRProcessor, exist_ok=True)
