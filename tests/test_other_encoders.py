"""Encoders that start from SAM and CLIP, or from GOT-OCR2: all of both is taken, and computes the same."""

import json

import pytest
import torch
from helpers import pixels, relative_error
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    Qwen2Config,
    SamConfig,
    SamModel,
    SamVisionConfig,
)

from deepseek_ocr_vision.weights.other_encoders import COMPRESSOR, from_got_ocr2, from_sam_and_clip


SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 64,
    "image_size": 128,
    "window_size": 3,
    "global_attn_indexes": [1],
    "output_channels": 16,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(1)
    return randomised(SamModel(SamConfig(vision_config=SamVisionConfig(**SAM).to_dict())).eval())


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(2)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    return randomised(CLIPModel(CLIPConfig(text_config=CLIPTextConfig(**sizes), vision_config=vision)).eval())


def randomised(model):
    """With no weight at a value that an initialisation gives by itself."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def as_segment_anything(sam) -> dict[str, torch.Tensor]:
    """The same weights under segment-anything's own names."""
    renames = {"vision_encoder.": "image_encoder.", ".layers.": ".blocks.", "layer_norm1.": "norm1."}
    renames |= {"layer_norm2.": "norm2.", "patch_embed.projection.": "patch_embed.proj."}
    necks = {"neck.conv1.": "neck.0.", "neck.norm1.": "neck.1.", "neck.layer_norm1.": "neck.1."}
    necks |= {"neck.conv2.": "neck.2.", "neck.norm2.": "neck.3.", "neck.layer_norm2.": "neck.3."}
    tensors = {}
    for name, tensor in sam.state_dict().items():
        for old, new in (necks | renames if ".neck." in name else renames).items():
            name = name.replace(old, new)
        tensors[name] = tensor
    return tensors


def as_openai(clip) -> dict[str, torch.Tensor]:
    """The same weights under OpenAI's own names."""
    theirs = {name: tensor for name, tensor in clip.state_dict().items() if name.startswith("vision_model.")}
    prefix, tensors = "vision_model.encoder.layers.", {}
    for name, tensor in theirs.items():
        if name.startswith(prefix) and "_proj" not in name:
            new = (
                name.removeprefix(prefix).replace("layer_norm", "ln_").replace("fc1", "c_fc").replace("fc2", "c_proj")
            )
            tensors[f"visual.transformer.resblocks.{new}"] = tensor
    for index in range(2):
        for kind in ("weight", "bias"):
            attention = f"{prefix}{index}.self_attn."
            parts = [theirs[f"{attention}{part}_proj.{kind}"] for part in "qkv"]
            target = f"visual.transformer.resblocks.{index}.attn."
            tensors[f"{target}in_proj_{kind}"] = torch.cat(parts)
            tensors[f"{target}out_proj.{kind}"] = theirs[f"{attention}out_proj.{kind}"]
    tensors["visual.class_embedding"] = theirs["vision_model.embeddings.class_embedding"]
    tensors["visual.positional_embedding"] = theirs["vision_model.embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        tensors[f"visual.ln_pre.{kind}"] = theirs[f"vision_model.pre_layrnorm.{kind}"]
    return tensors


@pytest.mark.parametrize("layout", ["transformers", "vision models", "their own", "a pickle"])
def test_both_stages_compute_what_sam_and_clip_do(tmp_path, sam, clip, layout):
    """Pins names, order of query, key and value, and the fused projections, against both models' own forward."""
    if layout == "transformers":
        sam.save_pretrained(tmp_path / "sam")
        clip.save_pretrained(tmp_path / "clip")
        sources = (tmp_path / "sam", tmp_path / "clip")
    elif layout == "vision models":
        # As transformers 5.24 saves a `CLIPVisionModel`, with a table that OpenAI's own files have.
        names = {name: name.removeprefix("vision_model.") for name in clip.state_dict() if "vision_model" in name}
        tensors = {short: clip.state_dict()[name].clone() for name, short in names.items()}
        (tmp_path / "clip").mkdir()
        save_file(tensors | {"embeddings.position_ids": torch.arange(5)[None]}, tmp_path / "clip/model.safetensors")
        (tmp_path / "clip/config.json").write_text(json.dumps(clip.config.vision_config.to_dict()))
        sources = (as_segment_anything(sam), tmp_path / "clip")
    elif layout == "their own":
        sources = (as_segment_anything(sam), as_openai(clip))
    else:
        torch.save(as_segment_anything(sam), tmp_path / "sam.pth")
        sources = (tmp_path / "sam.pth", as_openai(clip))
    model = from_sam_and_clip(*sources, feature_mode="concat")
    pixel_values = pixels(1)
    with torch.no_grad():
        neck = model.sam_model.neck
        seen = {}
        hook = neck.register_forward_hook(lambda module, inputs, output: seen.setdefault("neck", output))
        model(pixel_values)
        hook.remove()
        expected = sam.vision_encoder(pixel_values).last_hidden_state
        assert relative_error(seen["neck"].reshape(expected.shape), expected) < 1e-4

        feature_map = torch.randn(1, 128, 2, 2)
        embeddings = clip.vision_model.embeddings
        tokens = torch.cat([embeddings.class_embedding.view(1, 1, -1), feature_map.flatten(2).transpose(1, 2)], dim=1)
        tokens = clip.vision_model.pre_layrnorm(tokens + embeddings.position_embedding.weight)
        expected = clip.vision_model.encoder(inputs_embeds=tokens).last_hidden_state
        assert relative_error(model.vision_model(feature_map).last_hidden_state, expected) < 1e-4


def test_the_compressor_alone_is_new(sam, clip):
    """Pins what is taken, all of it, and that every parameter trains."""
    model = from_sam_and_clip(sam.state_dict(), clip.state_dict())
    taken = {tensor.detach().flatten()[0].item() for tensor in (*sam.parameters(), *clip.parameters())}
    new = [name for name, tensor in model.named_parameters() if tensor.flatten()[0].item() not in taken]
    assert new == list(COMPRESSOR)
    model.train()(pixels(1)).last_hidden_state.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_position_table_of_another_size_is_resized(sam, clip):
    """Pins CLIP at 336 pixels, whose table is of 24 x 24 patches, for a page of 16 x 16 tokens."""
    name = "vision_model.embeddings.position_embedding.weight"
    tensors = clip.state_dict()
    larger = torch.cat([tensors[name][:1], tensors[name][1:].mean(dim=0, keepdim=True).expand(9, -1)])
    model = from_sam_and_clip(sam.state_dict(), tensors | {name: larger})
    positions = model.vision_model.embeddings.position_embedding.weight
    assert positions.shape == (5, 128)
    assert torch.allclose(positions[1:], larger[1:5], atol=1e-5)
    assert model.config.clip_config.grid_size == 2


@pytest.mark.parametrize("layout", ["transformers", "their own"])
def test_got_ocr2_gives_stage_one_with_its_convolutions(tmp_path, clip, layout):
    """Pins that all of GOT-OCR2's encoder arrives in `SamEncoder`, and computes the same."""
    torch.manual_seed(3)
    text = Qwen2Config(
        vocab_size=20, hidden_size=128, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = GotOcr2Config(vision_config=SAM, text_config=text.to_dict(), image_token_index=3)
    got = randomised(GotOcr2ForConditionalGeneration(config).eval())
    projector = got.model.multi_modal_projector
    tower = got.model.vision_tower
    if layout == "transformers":
        got.save_pretrained(tmp_path / "got")
        source = tmp_path / "got"
    else:
        fake = torch.nn.Module()
        fake.vision_encoder = tower
        source = {
            name.replace("image_encoder.", "model.vision_tower_high."): tensor
            for name, tensor in as_segment_anything(fake).items()
        }
        source["model.vision_tower_high.net_2.weight"] = projector.conv_upsampler1.weight
        source["model.vision_tower_high.net_3.weight"] = projector.conv_upsampler2.weight
    clip_state = clip.state_dict()
    width = projector.conv_upsampler2.weight.shape[0]
    assert width == clip.config.vision_config.hidden_size
    model = from_got_ocr2(source, clip_state, feature_mode="concat")
    pixel_values = pixels(1)
    with torch.no_grad():
        expected = projector.conv_upsampler2(projector.conv_upsampler1(tower(pixel_values).last_hidden_state))
        assert relative_error(model.sam_model(pixel_values), expected) < 1e-4


def test_what_is_no_sam_no_clip_and_no_got_is_refused(sam, clip):
    """Pins the account: nothing but the compressor may be newly initialised."""
    without = {name: tensor for name, tensor in sam.state_dict().items() if "layers.1.mlp.lin2.bias" not in name}
    with pytest.raises(ValueError, match=r"1 tensors are missing: sam_model.blocks.1.mlp.lin2.bias"):
        from_sam_and_clip(without, clip.state_dict())
    with pytest.raises(ValueError, match="no tensor"):
        from_sam_and_clip(clip.state_dict(), sam.state_dict())
    with pytest.raises(ValueError, match="no GOT-OCR2"):
        from_got_ocr2(sam.state_dict(), clip.state_dict())
    with pytest.raises(TypeError, match="`sam` has to be a path or a Hub id"):
        from_sam_and_clip(3, clip.state_dict())
    spoilt = sam.state_dict() | {"vision_encoder.pos_embed": torch.full((1, 8, 8, 32), torch.nan)}
    with pytest.raises(ValueError, match="pos_embed holds NaN"):
        from_sam_and_clip(spoilt, clip.state_dict())
