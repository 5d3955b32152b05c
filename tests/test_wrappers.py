"""Tools that stand around the model or take the place of its layers: the plain model's numbers, whatever they do."""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from encoding_helpers import IMAGE_PROCESSOR, assert_same, encode
from helpers import EVERY_FEATURE_MODE, pixels, relative_error, tiny_config
from PIL import Image
from torch import nn
from training_job import needs_fsdp_on_cpu

from deepseek_ocr_vision import DeepSeekOCRVisionModel
from deepseek_ocr_vision.visualize import view_page


def model_of(feature_mode: str) -> DeepSeekOCRVisionModel:
    return DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode)).eval()


def page() -> Image.Image:
    return Image.linear_gradient("L").resize((128, 128))


# Copies


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_a_replica_of_data_parallel_computes_the_same(feature_mode):
    """Pins `self.dtype`, which asks for parameters: replicas, as `Trainer` makes them for several GPUs, have none."""
    model = model_of(feature_mode)
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas.get(child))
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
    tokens = replicas[model](pixels()).last_hidden_state
    assert torch.equal(tokens, model(pixels()).last_hidden_state)
    tokens.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Weights that are elsewhere until their module is called


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_offloaded_weights_give_the_same_tokens(feature_mode, where, tmp_path):
    """Pins a weight that is read outside of its module's forward pass, when it is on the meta device."""
    model = model_of(feature_mode)
    expected, (encoded,) = model(pixels()).last_hidden_state, model.encode(page())
    device = torch.device("cpu")
    if where == "cpu":
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=device)
    else:
        offloaded = disk_offload(copy.deepcopy(model), tmp_path, execution_device=device)
    assert offloaded.device.type == "meta"
    assert torch.equal(offloaded(pixels()).last_hidden_state, expected)
    assert torch.equal(offloaded.encode(page())[0], encoded)


def test_any_split_between_memory_and_disk_gives_the_same_tokens(tmp_path):
    """Pins `device_map="auto"`, which cuts the encoder wherever the memory ends."""
    model = model_of("sequence")
    model.save_pretrained(tmp_path / "model")
    expected, num_bytes = model(pixels()).last_hidden_state, sum(weight.nbytes for weight in model.parameters())
    maps = set()
    for share in (0.0, 0.4, 0.7, 0.9):
        options = {"max_memory": {"cpu": int(share * num_bytes) + 1}, "offload_folder": tmp_path / "offloaded"}
        split = DeepSeekOCRVisionModel.from_pretrained(tmp_path / "model", device_map="auto", **options)
        if not hasattr(split, "hf_device_map"):
            continue  # transformers 5.0 gives a model no hooks of which nothing is in memory
        maps.add(str(split.hf_device_map))
        assert torch.equal(split(pixels()).last_hidden_state, expected)
    assert len(maps) > 2


def test_offloaded_weights_fill_the_same_table_and_are_shown(tmp_path):
    """Pins pages that were sent to the meta device, and a fingerprint of weights that are not there."""
    pytest.importorskip("pyarrow", reason="the extra `encode` is not installed")
    page().save(tmp_path / "page.png")
    model = model_of("residual")
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert encode(tmp_path / "page.png", model, tmp_path / "plain").num_new == 1
    assert encode(tmp_path / "page.png", offloaded, tmp_path / "plain").num_new == 0
    assert encode(tmp_path / "page.png", offloaded, tmp_path / "offloaded").num_new == 1
    assert_same(tmp_path / "plain", tmp_path / "offloaded")
    shown = [view_page(each, page(), image_processor=IMAGE_PROCESSOR).tokens for each in (model, offloaded)]
    assert torch.equal(*shown)
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        encode(tmp_path / "page.png", model.to("meta"), tmp_path / "nothing")


@pytest.fixture
def one_process():
    """A group of this process alone, which shards like one of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_fsdp_on_cpu
@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_fsdp_of_every_module_by_itself_gives_the_same_tokens_and_gradients(feature_mode, one_process):
    """Pins a table that is read while it is sharded: "got mixed torch.Tensor and DTensor"."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of(feature_mode).train()
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for module in reversed([*sharded.modules()]):
        if not isinstance(module, nn.ModuleList) and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    tokens, expected = (each(pixels()).last_hidden_state for each in (sharded, model))
    assert torch.equal(tokens, expected)
    for each in (tokens, expected):
        each.square().mean().backward()
    for ours, theirs in zip(sharded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


# Other layers in the place of linear ones


def assert_close_and_different(model: nn.Module, expected: torch.Tensor) -> None:
    """8 bits give nearly the same tokens, and not the same, or nothing was replaced."""
    with torch.no_grad():
        error = relative_error(model(pixels()).last_hidden_state, expected)
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_pytorch_s_dynamic_int8_takes_the_place_of_every_linear_layer(feature_mode):
    """Pins `qkv` called with a single row, and weights that are a method and no tensor."""
    model = model_of(feature_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    assert_close_and_different(quantised, model(pixels()).last_hidden_state.detach())


@pytest.mark.parametrize("recipe", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("feature_mode", ["residual", "projected"])
def test_torchao_s_int8_takes_the_place_of_every_linear_layer(feature_mode, recipe):
    """Pins tensors that are quantised, whose dtype stays that of the weights."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = model_of(feature_mode)
    expected = model(pixels()).last_hidden_state.detach()
    quantization.quantize_(model, getattr(quantization, recipe)())
    assert_close_and_different(model, expected)


def test_bitsandbytes_8_bits_take_the_place_of_every_linear_layer():
    """Pins its layers, whose weights are integers."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = model_of("projected")
    expected = model(pixels()).last_hidden_state.detach()
    for name, layer in [*model.named_modules()]:
        if type(layer) is nn.Linear:
            replacement = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            replacement.load_state_dict(layer.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement.to("cpu"))
    assert_close_and_different(model, expected)


@pytest.mark.parametrize("side", [128, 192])
def test_a_hook_sees_each_linear_layer_once_with_rows_of_tokens(tiny_model, side):
    """Pins observers of a calibration, which a second call with a single row would mislead."""
    calls = []
    for name, module in tiny_model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: calls.append((name, inputs[0].ndim)))
    tiny_model(pixels(1, side, side))
    assert len({name for name, _ in calls}) == len(calls)
    assert all(ndim >= 2 for _, ndim in calls)


# Graphs that are recorded


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_a_trace_gives_the_model_s_tokens_for_other_pixels(feature_mode, enabled):
    """Pins loops over blocks that a trace lost: tokens wrong by 0.6 standard deviations, without an error."""
    model, other = model_of(feature_mode), torch.randn_like(pixels())
    with torch.set_grad_enabled(enabled), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (pixels(),), strict=False, check_trace=False)
        tokens = traced(other)["last_hidden_state"]
    assert relative_error(tokens, model(other).last_hidden_state) < 1e-4


class TokensOnly(nn.Module):
    """An encoder that returns a tensor."""

    def __init__(self, encoder: DeepSeekOCRVisionModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values).last_hidden_state


@pytest.mark.parametrize("feature_mode", EVERY_FEATURE_MODE)
def test_onnx_by_the_exporter_that_traces_gives_the_model_s_tokens(feature_mode):
    """Pins `torch.onnx.export(dynamo=False)`: loops that a trace lost, and negative numbers rounded another way."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnx.reference", reason="this onnx has no reference runtime")
    model, file = model_of(feature_mode), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(TokensOnly(model), (pixels(),), file, dynamo=False, input_names=["pixel_values"])
    runtime = onnx.reference.ReferenceEvaluator(onnx.load_from_string(file.getvalue()))
    other = torch.randn_like(pixels())
    (tokens,) = runtime.run(None, {"pixel_values": other.numpy()})
    assert relative_error(torch.from_numpy(tokens), model(other).last_hidden_state) < 1e-4
