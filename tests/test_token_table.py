"""The table of tokens: what its readers see, what is stored, where it may be, and who else may fill it."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from encoding_helpers import IMAGE_PROCESSOR, assert_same, encode, image, png, stored, write_pdf
from helpers import ROOT, tiny_config
from test_documents import blocks

from deepseek_ocr_vision import DeepSeekOCRVisionModel, precompute_features
from deepseek_ocr_vision.__main__ import main
from deepseek_ocr_vision.encoding import EncodePages, load_pages
from deepseek_ocr_vision.encoding.table import TokenTable


datasets = pytest.importorskip("datasets")
pytest.importorskip("pypdfium2")


@pytest.fixture
def scans(tmp_path):
    """Seven pages: four images, and a PDF of three."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.png").write_bytes(png(seed))
    write_pdf(folder / "book.pdf", 10, 11, 12)
    return folder


# Readers


def test_every_export_of_loaded_pages_has_the_tokens(tiny_model, scans, tmp_path):
    """Pins row numbers that were exported in place of tokens, and `save_to_disk`, which failed."""
    encode(scans, tiny_model, tmp_path / "out")
    pages = load_pages(tmp_path / "out")
    expected = list(stored(tmp_path / "out").values())
    pages.to_parquet(tmp_path / "exported.parquet")
    pages.to_json(tmp_path / "exported.json")
    pages.save_to_disk(tmp_path / "exported")
    exports = {
        "parquet": datasets.Dataset.from_parquet(str(tmp_path / "exported.parquet"))["tokens"],
        "json": [json.loads(line)["tokens"] for line in (tmp_path / "exported.json").read_text().splitlines()],
        "disk": datasets.load_from_disk(tmp_path / "exported")["tokens"],
        "pandas": [np.stack(tokens) for tokens in pages.to_pandas()["tokens"]],
        "dict": pages.to_dict()["tokens"],
        "numpy": pages.with_format("numpy")["tokens"],
        "selected": pages.select(range(7)).with_format(None)["tokens"],
    }
    for name, tokens in exports.items():
        for actual, each in zip(tokens, expected, strict=True):
            torch.testing.assert_close(torch.tensor(np.array(actual)).float(), each, rtol=0, atol=1e-6, msg=name)


def rows_as(tool: str, rows) -> list[dict]:
    """What another tool gives, as dictionaries."""
    convert = {
        "load_dataset": lambda: rows.to_list(),
        "pyarrow": lambda: rows.to_pylist(),
        "pandas": lambda: rows.to_dict("records"),
        "duckdb": lambda: rows.df().to_dict("records"),
        "ray": lambda: rows.take_all(),
        "SparkSession": lambda: [row.asDict() for row in rows.collect()],
    }
    return convert[tool]()


@pytest.mark.parametrize("tool", ["load_dataset", "pyarrow", "pandas", "duckdb", "SparkSession"])  # and Ray, below
def test_other_readers_need_nothing_of_this_package(tool, tiny_model, scans, tmp_path, monkeypatch):
    """Pins the lines of docs/encoding.md for each of them."""
    pytest.importorskip({"SparkSession": "pyspark", "load_dataset": "datasets"}.get(tool, tool))
    encode(scans, tiny_model, tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    assert_reads(tool)


def assert_reads(tool: str) -> None:
    """The lines of docs/encoding.md for a tool read the tokens in the folder `tokens`."""
    codes = [block.code for block in blocks(ROOT / "docs" / "encoding.md") if "rows = " in block.code]
    lines = [line for line in "\n".join(codes).splitlines() if "glob" in line or tool in line]
    namespace: dict = {}
    exec("\n".join(lines), namespace)
    expected = stored("tokens")
    rows = rows_as(tool, namespace["rows"])
    assert len(rows) == len(expected)
    for row in rows:
        tokens = np.stack([np.array(token, dtype=np.float32) for token in row["tokens"]])
        assert np.array_equal(tokens, expected[os.path.basename(row["source"]), row["page"]].numpy())


@pytest.mark.parametrize("folder", ["proj [v2]", "tok*"])
def test_a_folder_may_have_a_name_that_looks_like_a_pattern(tiny_model, scans, tmp_path, folder):
    """Pins `[`, by which a table looked empty: all was computed again, and features came without a row."""
    out = tmp_path / folder / "tokens"
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "other").touch()
    assert [encode(scans, tiny_model, out).num_new for _ in range(2)] == [7, 0]
    assert len(load_pages(out)) == 7
    pages = datasets.Dataset.from_dict({"image": [{"bytes": png(0), "path": None}]})
    pages = pages.cast_column("image", datasets.Image())
    options = {"cache_dir": tmp_path / folder, "show_progress": False}
    assert len(precompute_features(pages, tiny_model, IMAGE_PROCESSOR, **options)) == 1


# What is stored


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("float32", 0), ("float16", 2**-10), ("bfloat16", 2**-8), ("int8", 1 / 127), ("none", None)],
)
def test_tokens_are_stored_as_they_are_asked_for(tiny_model, scans, tmp_path, kind, tolerance):
    """Pins each type beside the model's own tokens, the means of all, and what the settings say."""
    encode([scans / "0.png"], tiny_model, tmp_path / "out", tokens=kind)
    (row,) = load_pages(tmp_path / "out")
    (expected,) = tiny_model.encode([image(0)], image_processor=IMAGE_PROCESSOR)
    assert TokenTable(tmp_path / "out").settings["tokens"] == kind
    torch.testing.assert_close(row["pooled"], expected.mean(dim=0), rtol=0, atol=0.02)
    assert row["num_tokens"] == 4
    if tolerance is None:
        assert "tokens" not in row
        return
    errors = (row["tokens"] - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
    assert (errors <= tolerance).all()
    assert torch.equal(TokenTable(tmp_path / "out").read(row["id"]).float(), row["tokens"])
    with pytest.raises(ValueError, match=f"tokens is {kind!r} there and 'float64' now"):
        encode(scans, tiny_model, tmp_path / "out", tokens="float64")


def test_other_tokens_at_a_url_are_read_and_added_to(tiny_model, scans, tmp_path):
    """Pins a table at `memory://`, which stands for every file system of fsspec."""
    url = f"memory://{tmp_path.name}/tokens"
    (scans / "broken.png").write_bytes(b"no image")
    assert encode([scans / "0.png", scans / "broken.png"], tiny_model, url).num_new == 1
    assert TokenTable(url).fs.cat_file(TokenTable(url).path("errors.jsonl")).count(b"broken.png") == 1
    (scans / "broken.png").unlink()
    assert encode(scans, tiny_model, url).num_new == 6
    encode(scans, tiny_model, tmp_path / "out")
    assert_same(url, tmp_path / "out")
    assert not TokenTable(url).fs.exists(TokenTable(url).path("errors.jsonl"))


def test_a_bucket_of_s3_holds_a_table(tiny_model, scans, tmp_path, monkeypatch):
    """Pins a store of objects as clouds have them, by a server on this machine."""
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it stands for every other server, too
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        assert encode(scans, tiny_model, "s3://bucket/tokens").num_new == 7
        assert encode(scans, tiny_model, "s3://bucket/tokens").num_new == 0
        encode(scans, tiny_model, tmp_path / "out")
        assert_same("s3://bucket/tokens", tmp_path / "out")
        assert torch.equal(load_pages("s3://bucket/tokens")[0]["tokens"], stored(tmp_path / "out")["0.png", 0])
    finally:
        running.stop()


# Who fills it


def save_encoder(folder) -> DeepSeekOCRVisionModel:
    model = DeepSeekOCRVisionModel(tiny_config())
    model.save_pretrained(folder)
    IMAGE_PROCESSOR.save_pretrained(folder)
    return model


def test_shares_of_the_pages_are_all_of_them_each_once(scans, tmp_path, capsys):
    """Pins `--shard`, as an array of jobs starts it, with a problem in a file of its own, and `--progress-json`."""
    model = save_encoder(tmp_path / "encoder")
    (scans / "broken.png").write_bytes(b"no image")
    command = ["encode", str(scans), "--model", str(tmp_path / "encoder"), "--out", str(tmp_path / "out")]
    codes = []
    for number in range(3):
        codes.append(
            main([*command, "--workers", "0", "--device", "cpu", "--shard", f"{number}/3", "--progress-json"])
        )
        progress = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert progress[-1]["done"]
        assert progress[-1]["pages"] == progress[-1]["total"]
        assert 0 <= progress[-1]["encoder_share"] <= 1
    assert codes == [3, 0, 0]
    assert [path.name for path in (tmp_path / "out").glob("errors*")] == ["errors-0-of-3.jsonl"]
    (scans / "broken.png").unlink()
    encode(scans, model, tmp_path / "untouched")
    assert_same(tmp_path / "out", tmp_path / "untouched")
    with pytest.raises(ValueError, match=r"shard\[0\]"):
        encode(scans, model, tmp_path / "out", shard=(3, 3))


def test_the_pages_of_one_document_are_shared_out(tiny_model, tmp_path):
    """Pins all pages of a document in one share, and jobs without any."""
    write_pdf(tmp_path / "book.pdf", *range(12))
    shares = [encode(tmp_path / "book.pdf", tiny_model, tmp_path / "out", shard=(i, 4)).num_pages for i in range(4)]
    assert shares == [3, 3, 3, 3]


def test_the_same_image_in_two_rows_is_in_one_share(tiny_model, tmp_path):
    """Pins rows of one content in two shares, which two jobs would both store where there are no locks."""
    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(0), "path": None}] * 4})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "rows")
    shares = [encode(tmp_path / "rows", tiny_model, tmp_path / f"{i}", shard=(i, 4)).num_new for i in range(4)]
    assert sorted(shares) == [0, 0, 0, 1]


def test_an_encoder_of_batches_reads_a_file_again_and_takes_none(tiny_model, tmp_path):
    """Pins the last page of a TIFF in place of the first, from the second time on, and an empty batch."""
    image(1).save(tmp_path / "fax.tif", save_all=True, append_images=[image(2), image(3)])
    encode_batch = EncodePages(tiny_model, IMAGE_PROCESSOR)
    first, again = (encode_batch({"path": [str(tmp_path / "fax.tif")]}) for _ in range(2))
    assert first["tokens"] == again["tokens"]
    assert len(first) == 3
    assert encode_batch({"path": []}).schema == first.schema


def test_a_loop_of_somebody_else_gets_the_same_rows(tiny_model, scans, tmp_path):
    """Pins `EncodePages` with paths and with bytes, in dictionaries, data frames and `datasets.map`."""
    import pyarrow

    encode(scans, tiny_model, tmp_path / "out")
    expected = stored(tmp_path / "out")
    by_path = EncodePages(tiny_model, IMAGE_PROCESSOR)
    rows = by_path({"path": np.array([str(scans / "0.png"), str(scans / "book.pdf"), "/nowhere.png"])}).to_pylist()
    assert [row["error"] is None for row in rows] == [True] * 4 + [False]
    assert "No such file" in rows[4]["error"]
    for row, page in zip(rows, [("0.png", 0), *(("book.pdf", number) for number in range(3))], strict=False):
        assert np.array_equal(np.array(row["tokens"], dtype=np.float32), expected[page].numpy())
    by_bytes = EncodePages(tiny_model, IMAGE_PROCESSOR, column="bytes", tokens="none")
    files = pyarrow.record_batch({"bytes": [png(0), (scans / "book.pdf").read_bytes(), b"no image"]})
    assert by_bytes(files)["id"] == by_bytes(files.to_pandas())["id"]  # the first is what `mapInArrow` of Spark gives
    frame = by_bytes(files).to_pandas()
    assert list(frame["id"][:4]) == [row["id"] for row in rows[:4]]
    assert frame["source"][0] == "bytes 0 of the batch"
    mapped = datasets.Dataset.from_dict({"path": [str(scans / "book.pdf")]})
    mapped = mapped.map(by_path, batched=True, remove_columns=["path"])
    assert mapped["id"][:] == [row["id"] for row in rows[1:4]]


@pytest.mark.skipif(sys.platform != "linux", reason="Ray's local cluster is tried on Linux")
def test_ray_fills_the_same_table_and_goes_on_with_what_another_began(tiny_model, scans, tmp_path, monkeypatch):
    """Pins the second engine beside the first, tokens bit for bit, resuming across both, a page that fails, Ray as a
    reader of the table, and `EncodePages` as docs/encoding.md has it.
    """
    ray = pytest.importorskip("ray")
    encode(scans, tiny_model, tmp_path / "untouched")
    encode([scans / "0.png", scans / "1.png"], tiny_model, tmp_path / "tokens")
    (scans / "cut.png").write_bytes(png(7)[:3000])
    options = {"ray": "local", "num_encoders": 2, "num_workers": 1, "timeout": 60}
    summary = encode(scans, tiny_model, tmp_path / "tokens", **options)
    assert (summary.num_pages, summary.num_new, len(summary.problems)) == (7, 5, 1)
    assert len(TokenTable(tmp_path / "tokens").parts) == 1 + 3  # of two pages each, and not of all that Ray has
    assert "truncated" in (tmp_path / "tokens" / "errors.jsonl").read_text()
    assert_same(tmp_path / "tokens", tmp_path / "untouched")
    monkeypatch.chdir(tmp_path)
    ray.init("local", num_cpus=1, log_to_driver=False)
    try:
        assert_reads("ray")
        tiny_model.save_pretrained("encoder")
        IMAGE_PROCESSOR.save_pretrained("encoder")
        files = ray.data.from_items([{"path": str(scans / name)} for name in ("book.pdf", "0.png")])
        actors = ray.data.ActorPoolStrategy(size=1)
        options = {"fn_constructor_kwargs": {"model": str(tmp_path / "encoder")}, "compute": actors, "batch_size": 2}
        rows = files.map_batches(EncodePages, **options).take_all()
        expected = stored(tmp_path / "untouched")
        assert len(rows) == 4
        for row in rows:
            tokens = np.stack([np.array(token) for token in row["tokens"]])
            assert np.array_equal(tokens, expected[os.path.basename(row["source"]), row["page"]].numpy())
    finally:
        ray.shutdown()
