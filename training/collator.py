"""Batches of images and text for transformers' `Trainer`, made by the processor of a LLaVA.

Letters in the shapes: B samples, L tokens of the longest one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from PIL import Image
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from deepseek_ocr_vision.configuration.checks_deepseek_ocr_vision import require_choice
from deepseek_ocr_vision.processing.image_processing_deepseek_ocr_vision import (
    TOKEN_SIZE,
    DeepSeekOCRVisionImageProcessor,
)


PaddingSide = Literal["right", "left"]

NOT_TRAINED_ON = -100
"""The label that cross entropy passes over."""

_FORMS = ({"messages"}, {"prompt", "answer"}, {"prompt", "completion"}, {"text"})


class Part(NamedTuple):
    """A piece of a sample's text, and whether the model is to write it."""

    text: str
    is_answer: bool


class ImageTextCollator:
    """Turns samples of images and text into the batches that a LLaVA is trained on.

    A sample is a dictionary, such as a row of a data set. Its text comes in one of these forms:

    - `prompt` and `answer`, or `prompt` and `completion` as TRL has it: the answer is trained on, with the tokenizer's
      end of sequence after it. With `completion` both may be lists of messages; the completion's are trained on;
    - `messages`: a conversation, written out by the processor's chat template. Every turn of the assistant is trained
      on, as far as the template writes it after the header of such a turn;
    - `text`: what follows the last image is trained on, all of it where there is no image, with the end of sequence
      after it.

    Its images are a list under `images`, one under `image`, or inside the messages as
    `{"type": "image", "image": ...}`, in any form that the image processor takes. All may be missing. The text holds
    the processor's image token, such as `<image>`, once for each of them. `None` counts as missing, as tables have it
    where rows differ.

    Prompts and answers are tokenised apart, so that a prompt has the tokens that `generate` is given. `Trainer` needs
    `remove_unused_columns=False` in its arguments, or it drops the images.

    Args:
        processor: A `LlavaProcessor`, or another one that is called with `images` and `text`, has an `image_token`,
            and gives `input_ids` and `attention_mask`.
        padding_side: Where shorter samples are filled up. Causal language models train the same either way.
        touch_encoder: Whether a batch without any image gets a blank one, as small as the processor can have it, whose
            placeholders stand behind the samples, masked like padding. Loss and gradients stay the same, and every
            parameter of encoder and projector gets a gradient, of zeros. Processes that train together need that:
            where one has images and another has none, they wait for each other or stop. If false, such batches hold no
            `pixel_values`, and the optimizer leaves encoder and projector alone then; with zeros AdamW still follows
            its momentum and its weight decay.

    Raises:
        TypeError: The processor is none for images and text.
        ValueError: `padding_side` is not known, or the tokenizer has no token for padding or the end of a sequence.
    """

    def __init__(self, processor: Any, *, padding_side: PaddingSide = "right", touch_encoder: bool = True):
        missing = [name for name in ("image_processor", "tokenizer", "image_token") if not hasattr(processor, name)]
        if missing:
            raise TypeError(f"`processor` is a {type(processor).__name__}, which has no {' and no '.join(missing)}.")
        require_choice("padding_side", padding_side, get_args(PaddingSide))
        for name in ("pad_token", "eos_token"):
            if getattr(processor.tokenizer, name) is None:
                raise ValueError(f"The tokenizer of `processor` has no `{name}`; set one before.")
        self.processor = processor
        self.padding_side = padding_side
        self.touch_encoder = touch_encoder

    def __call__(self, samples: Sequence[Mapping[str, Any]], **kwargs) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            samples: The samples, at least one.
            kwargs: Without effect, such as `return_tensors`, which transformers' own collators take.

        Returns:
            `input_ids`, `attention_mask` and `labels`, integers [B, L], and what the image processor gives, such as
            `pixel_values` [P, 3, H, W] for P images, in the order of the samples. Labels are -100 wherever nothing
            is trained on: prompts, image tokens, padding.

        Raises:
            TypeError: A text is no string.
            ValueError: A sample's text has none of the forms or more than one, does not hold as many image tokens as
                there are images, or holds one in an answer; the message names the sample.
        """
        conversations, images = [], []
        for index, sample in enumerate(samples):
            name = f"Sample {index} of the batch"
            parts, of_sample = self._parts(sample, name), _images(sample, name)
            self._check_image_tokens(parts, len(of_sample), name)
            conversations.append(parts)
            images.extend(of_sample)
        token_ids, image_inputs = self._encode([part.text for parts in conversations for part in parts], images)
        batch = self._padded(conversations, token_ids)
        if not images and self.touch_encoder:
            batch, image_inputs = self._with_blank_image(batch)
        return batch | image_inputs

    # Samples to parts

    def _parts(self, sample: Mapping[str, Any], name: str) -> list[Part]:
        """A sample's text in pieces that are trained on and pieces that are not."""
        form = {key for key in set().union(*_FORMS) if sample.get(key) is not None}
        if form not in _FORMS:
            raise ValueError(
                f"{name} has text under {sorted(form)}; it has to be `messages` alone, `prompt` with `answer` or "
                f"`completion`, or `text` alone. Its keys are {sorted(sample)}. `Trainer` drops columns that the "
                "model does not know, unless its arguments have `remove_unused_columns=False`."
            )
        if form == {"messages"}:
            return self._conversation(sample["messages"], name)
        if form == {"prompt", "completion"} and all(isinstance(sample[key], list | tuple) for key in form):
            prompt = sample["prompt"]
            return self._conversation([*prompt, *sample["completion"]], name, first_trained=len(prompt))
        for key in form:
            if not isinstance(sample[key], str):
                raise TypeError(f"{name} has a {type(sample[key]).__name__} under `{key}`; it has to be a string.")
        if form == {"text"}:
            before, image_token, after = sample["text"].rpartition(self.processor.image_token)
            return [Part(before + image_token, False), Part(self._ended(after), True)]
        (answer,) = form - {"prompt"}
        return [Part(sample["prompt"], False), Part(self._ended(sample[answer]), True)]

    def _ended(self, answer: str) -> str:
        """An answer with the end of the sequence after it."""
        return answer.removesuffix(self.processor.tokenizer.eos_token) + self.processor.tokenizer.eos_token

    def _conversation(self, messages: Sequence[Mapping[str, Any]], name: str, *, first_trained: int = 0) -> list[Part]:
        """A conversation as the chat template writes it: the assistant's turns, and what comes before each."""
        rendered = [_without_images(message) for message in messages]
        turns = [index for index, message in enumerate(rendered) if message["role"] == "assistant"]
        turns = [turn for turn in turns if turn >= first_trained]
        if not turns:
            raise ValueError(f"{name} has no message of the role 'assistant' to train on.")
        parts, written = [], ""
        render = partial(self.processor.apply_chat_template, tokenize=False)
        for turn in turns:
            prompt = render(rendered[:turn], add_generation_prompt=True) if turn else ""
            answered = render(rendered[: turn + 1])
            if not (prompt.startswith(written) and answered.startswith(prompt)):
                raise ValueError(
                    f"{name} has messages whose earlier turns the chat template writes otherwise once there are "
                    "later ones, so that answers cannot be told from prompts. Give it as `prompt` and `answer`."
                )
            parts += [Part(prompt[len(written) :], False), Part(answered[len(prompt) :], True)]
            written = answered
        return parts

    def _check_image_tokens(self, parts: list[Part], num_images: int, name: str) -> None:
        image_token = self.processor.image_token
        for part in parts:
            if part.is_answer and image_token in part.text:
                raise ValueError(f"{name} has an answer with {image_token!r} in it: {part.text!r}.")
        num_tokens = sum(part.text.count(image_token) for part in parts)
        if num_tokens != num_images:
            beginning = "".join(part.text for part in parts)[:80]
            raise ValueError(
                f"{name} has {num_images} images (under `images`, `image` or in its messages) and {num_tokens} times "
                f"{image_token!r} in its text, which begins {beginning!r}."
            )

    # Parts to tensors

    def _encode(
        self, texts: list[str], images: list[Any], **options
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Each text's token ids, image tokens expanded, and what the image processor makes of the images."""
        options |= {"add_special_tokens": False, "padding": True, "padding_side": "right", "return_tensors": "pt"}
        encoded = self.processor(images=images or None, text=texts, **options)
        masks = encoded["attention_mask"].bool()
        token_ids = [row[mask] for row, mask in zip(encoded["input_ids"], masks, strict=True)]
        names = self.processor.image_processor.model_input_names
        return token_ids, {name: encoded[name] for name in names if name in encoded}

    def _padded(self, conversations: list[list[Part]], token_ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The samples side by side, [B, L]."""
        remaining = iter(token_ids)
        rows, labels = [], []
        for parts in conversations:
            start = self._leading_ids(parts[0].text)
            pieces = [(part, next(remaining)) for part in parts]
            targets = [ids if part.is_answer else torch.full_like(ids, NOT_TRAINED_ON) for part, ids in pieces]
            rows.append(torch.cat([start, *(ids for _, ids in pieces)]))
            labels.append(torch.cat([torch.full_like(start, NOT_TRAINED_ON), *targets]))
        columns = {
            "input_ids": (rows, self.processor.tokenizer.pad_token_id),
            "attention_mask": ([torch.ones_like(row) for row in rows], 0),
            "labels": (labels, NOT_TRAINED_ON),
        }
        return {
            name: pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=self.padding_side)
            for name, (tensors, value) in columns.items()
        }

    def _leading_ids(self, text: str) -> torch.Tensor:
        """What the processor puts before a text by itself, such as the beginning of a sequence, unless it is there."""
        beginning = self.processor.tokenizer.bos_token
        if beginning is not None and text.startswith(beginning):
            return torch.tensor([], dtype=torch.long)
        (plain,), (special,) = (
            self.processor(text=["0"], add_special_tokens=wanted)["input_ids"] for wanted in (False, True)
        )
        return torch.tensor(special[: special.index(plain[0])], dtype=torch.long)

    def _with_blank_image(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The batch with an image that nothing attends to, its placeholders in new columns at the end.

        At the end and not on the side of the padding, so that no token's position changes.
        """
        blank = Image.new("RGB", (TOKEN_SIZE, TOKEN_SIZE), "white")
        # A page as small as can be, where it is known that the encoder takes any size. How many special tokens a
        # `LlavaProcessor` counts holds for its own size alone.
        takes_any_size = isinstance(self.processor.image_processor, DeepSeekOCRVisionImageProcessor)
        takes_any_size &= not getattr(self.processor, "num_additional_image_tokens", 0)
        options = {"size": TOKEN_SIZE} if takes_any_size else {}
        (placeholders,), image_inputs = self._encode([self.processor.image_token], [blank], **options)
        num_rows = len(batch["input_ids"])
        spare = -len(placeholders) % num_rows
        placeholders = functional.pad(placeholders, (0, spare), value=self.processor.tokenizer.pad_token_id)
        columns = {
            "input_ids": placeholders.view(num_rows, -1),
            "attention_mask": torch.zeros_like(placeholders).view(num_rows, -1),
            "labels": torch.full_like(placeholders, NOT_TRAINED_ON).view(num_rows, -1),
        }
        return {name: torch.cat([batch[name], columns[name]], dim=1) for name in batch}, image_inputs


def _images(sample: Mapping[str, Any], name: str) -> list[Any]:
    """A sample's images."""
    texts = [sample.get(key) for key in ("messages", "prompt", "completion")]
    messages = [message for text in texts if isinstance(text, list | tuple) for message in text]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list | tuple)]
    inside = [part.get("image") for content in contents for part in content if part.get("type") == "image"]
    inside = [image for image in inside if image is not None]
    places = {"`image`": sample.get("image"), "`images`": sample.get("images"), "its messages": inside or None}
    found = {place: images for place, images in places.items() if images is not None}
    if len(found) > 1:
        raise ValueError(f"{name} has images under {' and '.join(found)}; give them in one place.")
    images = next(iter(found.values()), [])
    images = [images] if "`image`" in found else images
    if not isinstance(images, list | tuple):
        raise TypeError(f"{name} has a {type(images).__name__} under `images`; it has to be a list.")
    for image in images:
        if image is None or isinstance(image, Mapping):
            kind = "None" if image is None else "a dictionary, as `datasets` has an image that it does not decode"
            raise TypeError(f"{name} has among its images {kind}; give images, or leave it out.")
    return list(images)


def _without_images(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for a chat template, which writes a placeholder for an image, whatever it is."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = [{"type": "image"} if part.get("type") == "image" else part for part in content]
    return {**message, "content": content}
