"""The benchmark of quantised encoders: a whole run at a tiny size, and that a recipe takes the layers it names."""

import sys

import pytest
import torch
from helpers import ROOT, tiny_config

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel


pytest.importorskip("torchao", reason="torchao is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
pytest.importorskip("rapidfuzz", reason="the extra `train` is not installed")
pytest.importorskip("sklearn", reason="the extra `train` is not installed")
sys.path.insert(0, str(ROOT))

from benchmarks import quantization


def test_each_recipe_makes_what_it_takes_smaller_and_keeps_the_tokens_near(tmp_path, capsys):
    """Pins a recipe that leaves all layers as they are, and one that breaks the tokens."""
    torch.manual_seed(0)
    # Wide enough for weights to outweigh scales and headers.
    sam = {"hidden_size": 128, "mlp_dim": 512, "global_attn_indexes": [0], "num_hidden_layers": 1}
    model = DeepSeekOCRVisionModel(tiny_config(sam_config=sam, clip_config={"num_hidden_layers": 1}))
    model.save_pretrained(tmp_path)
    DeepSeekOCRVisionImageProcessor(size=128).save_pretrained(tmp_path)
    quantization.main(["--model", str(tmp_path), "--num-pages", "16"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(rows) == 2 + 3 * len(quantization.GROUPS)
    assert float(rows[0][5]) == 0
    assert float(rows[1][5]) < 1e-4
    of_onnx = float(rows[1][3].rstrip("%"))  # with its graph
    shares: dict[tuple[str, str], float] = {}
    for name, group, size, share, _, error, cosine, *_ in rows[2:]:
        if name.startswith("torchao") and group in ("patch embedding", "neck, compressor"):
            assert size == "no linear layers"
            continue
        shares[name, group] = float(share.rstrip("%"))
        assert shares[name, group] < (of_onnx if name == "onnxruntime" else 100), (name, group)
        assert 0 < float(error) < 0.1, (name, group)
        assert float(cosine) > 0.99, (name, group)
    for (name, group), share in shares.items():
        assert shares[name, "all"] <= share, (name, group)
