"""The models that are measured, all with random weights: this package's encoder, its peers, and a LLaVA around it."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.processes import Job
from deepseek_ocr_vision import DeepSeekOCRVisionConfig, DeepSeekOCRVisionModel


INITIALIZER_RANGE = 0.02
LORA_RANK = 8
# A language model of 0.12 billion parameters, and a tiny one.
LANGUAGE_MODEL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
TINY_LANGUAGE_MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def encoder_config(*, tiny: bool = False) -> DeepSeekOCRVisionConfig:
    """The encoder of the released size with the released model's features, or a tiny one."""
    make = DeepSeekOCRVisionConfig.tiny if tiny else DeepSeekOCRVisionConfig
    return make(feature_mode="concat")


def encoder(job: Job) -> nn.Module:
    """This package's encoder."""
    with torch.device("meta"):
        model = DeepSeekOCRVisionModel(encoder_config(tiny=job.tiny))
    return with_random_weights(model, job)


def unlimited_ocr(job: Job) -> nn.Module:
    """transformers' encoder of the same architecture and the same features, with SDPA."""
    from transformers import UnlimitedOcrVisionConfig, UnlimitedOcrVisionModel

    config = encoder_config(tiny=job.tiny)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_dim", "window_size")
    names = (*names, "global_attn_indexes", "output_channels", "downsample_channels", "image_size")
    sam = {name: getattr(config.sam_config, name) for name in names}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    clip = {name: getattr(config.clip_config, name) for name in names}
    # Its CLIP states the grid in pixels, with 14 pixels per token.
    clip["image_size"] = config.clip_config.grid_size * 14
    peer_config = UnlimitedOcrVisionConfig(sam_config=sam, encoder_config=clip)
    with torch.device("meta"):
        model = UnlimitedOcrVisionModel(peer_config)
    model.set_attn_implementation("sdpa")
    return with_random_weights(model, job)


def deepseek_ocr_encoder(job: Job) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward pass of the package `deepseek-ocr-encoder`, around Unlimited-OCR's modules.

    The model that the package takes its modules from is not on PyPI.
    """
    if job.tiny:
        raise ValueError("it has a fixed width of 1024 channels")
    if job.training != "nothing":
        raise ValueError("it computes under inference_mode")
    from deepseek_ocr_encoder import DeepSeekOCREncoder

    model = unlimited_ocr(job)
    vision_model = SimpleNamespace(
        pre_layrnorm=model.vision_encoder.pre_layrnorm,
        transformer=TensorOutput(model.vision_encoder.encoder, "inputs_embeds"),
        embeddings=model.vision_encoder.embeddings,
    )
    full_model = SimpleNamespace(sam_model=TensorOutput(model.sam_encoder, "pixel_values"), vision_model=vision_model)
    peer = DeepSeekOCREncoder(full_model, device=job.device, dtype=getattr(torch, job.dtype))
    return lambda pixel_values: peer._forward_core(pixel_values.to(memory_format=torch.channels_last))


class TensorOutput(nn.Module):
    """A module that returns the tensor of its output, as DeepSeek's own modules do."""

    def __init__(self, module: nn.Module, argument: str):
        super().__init__()
        self.module, self.argument = module, argument

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.module(**{self.argument: hidden_states}).last_hidden_state


def composite(job: Job) -> nn.Module:
    """transformers' LLaVA: this package's encoder, a projector, and a Llama."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = TINY_LANGUAGE_MODEL if job.tiny else LANGUAGE_MODEL
    text_config = LlamaConfig(**sizes, num_attention_heads=16, vocab_size=8192)
    config = LlavaConfig(
        vision_config=encoder_config(tiny=job.tiny),
        text_config=text_config,
        image_token_index=text_config.vocab_size - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    # The rotary embedding computes its buffers when it is built, so it is built again on the real device.
    text_model = model.model.language_model
    rotary, text_model.rotary_emb = type(text_model.rotary_emb), nn.Identity()
    model = with_random_weights(model, job)
    text_model.rotary_emb = rotary(text_config).to(job.device)
    return model


MODELS: dict[str, Callable[[Job], Callable]] = {
    "encoder": encoder,
    "unlimited-ocr": unlimited_ocr,
    "deepseek-ocr-encoder": deepseek_ocr_encoder,
    "composite": composite,
}


def with_random_weights(model: nn.Module, job: Job) -> nn.Module:
    """Give a model on the meta device random weights, each a slice of one long random tensor.

    That takes a second; the models' own initialisation of 400 million weights takes longer than many a step, and the
    values matter neither to time nor to memory.
    """
    model = model.to(getattr(torch, job.dtype)).to_empty(device=job.device)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(job.seed)
    values = torch.randn(max(p.numel() for p in parameters) + len(parameters), generator=generator)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            part = values[index : index + parameter.numel()].view(parameter.shape)
            parameter.copy_(part * INITIALIZER_RANGE)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
        for buffer in model.buffers():
            if buffer.dtype != torch.long:
                raise ValueError(f"a buffer of {buffer.dtype} was left without values")
            # The only buffers are numbered positions.
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
    return model


def prepare_training(model: nn.Module, training: str) -> None:
    """Set which parameters get a gradient; `training` is that of a `Job`."""
    tower = model.model.vision_tower if hasattr(model, "lm_head") else model
    model.requires_grad_(training in ("full", "clip"))
    if training == "clip":
        tower.freeze("sam")
    elif training == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        adapters = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["qkv", "qkv_proj"])
        inject_adapter_in_model(adapters, tower)
    if model is not tower:
        model.model.multi_modal_projector.requires_grad_()
        for module in (model.model.language_model, model.lm_head):
            module.requires_grad_(training != "projector")
