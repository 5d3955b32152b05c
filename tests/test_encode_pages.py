"""Pages at scale: the right tokens, whatever they are read from, none twice and none lost, after any interruption."""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
from contextlib import closing
from pathlib import Path

import pytest
import torch
from encoding_helpers import IMAGE_PROCESSOR, assert_same, encode, errors, image, png, stored, write_pdf
from helpers import ROOT, tiny_config
from PIL import Image

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.__main__ import main
from deepseek_ocr_vision.encoding import load_pages
from deepseek_ocr_vision.encoding.table import TokenTable


datasets = pytest.importorskip("datasets")
pypdfium2 = pytest.importorskip("pypdfium2")


@pytest.fixture
def scans(tmp_path) -> Path:
    """A folder of seven pages: three images, one of them further inside, a PDF of three, and another image."""
    folder = tmp_path / "scans"
    (folder / "inside").mkdir(parents=True)
    for seed, name in enumerate(["0.png", "1.png", "inside/2.png", "z.png"]):
        (folder / name).write_bytes(png(seed))
    write_pdf(folder / "book.pdf", 10, 11, 12)
    (folder / "notes.txt").write_text("no page")
    (folder / "._0.png").write_text("what another system leaves beside an image")
    return folder


def places(out: Path, root: Path) -> list[tuple[str, int]]:
    """Source and page of each row, in order."""
    pages = load_pages(out).with_format(None).select_columns(["source", "page"])
    return [(os.path.relpath(row["source"], root), row["page"]) for row in pages]


SEVEN = [("0.png", 0), ("1.png", 0), *(("book.pdf", page) for page in range(3)), ("inside/2.png", 0), ("z.png", 0)]


# What comes out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_becomes_the_models_own_tokens_bit_for_bit(tiny_model, scans, tmp_path, dtype):
    """Pins order, pages of PDFs as they are drawn, and bfloat16, which Parquet does not have."""
    tiny_model.to(dtype)
    summary = encode(scans, tiny_model, tmp_path / "out")
    assert (summary.num_pages, summary.num_new, summary.problems) == (7, 7, [])
    assert sorted(places(tmp_path / "out", scans)) == SEVEN
    with closing(pypdfium2.PdfDocument(scans / "book.pdf")) as book:
        drawn = [page.render(scale=2).to_pil() for page in book]
    assert drawn[0].size == (140, 180)
    images = [image(0), image(1), *drawn, image(2), image(3)]
    expected = tiny_model.encode(images, image_processor=IMAGE_PROCESSOR)
    actual = stored(tmp_path / "out")
    for (name, page), tokens in zip(SEVEN, expected, strict=True):
        assert actual[Path(name).name, page].dtype == dtype
        assert torch.equal(actual[Path(name).name, page], tokens)


def test_rows_say_what_they_are(tiny_model, scans, tmp_path):
    """Pins ids, order, grids, means, and the settings that made them."""
    encode(scans, tiny_model, tmp_path / "out", pages_per_file=3)
    pages = load_pages(tmp_path / "out")
    assert [os.path.relpath(source, scans) for source in pages["source"]] == [name for name, _ in SEVEN]
    assert pages["page"][:] == [page for _, page in SEVEN]
    book = hashlib.sha256((scans / "book.pdf").read_bytes()).hexdigest()
    assert pages["id"][2:5] == [f"{book}:{page}" for page in range(3)]
    assert pages["id"][6] == hashlib.sha256(png(3)).hexdigest()
    row = pages[6]
    assert (row["grid"], row["patches_grid"], row["num_tokens"]) == ([2, 2], [1, 1], 4)
    assert row["tokens"].shape == (4, 32)
    assert torch.equal(row["pooled"], row["tokens"].mean(dim=0))
    settings = json.loads(pages.info.description)
    assert settings["feature_mode"] == "residual"
    assert settings["image_processor"]["size"] == {"height": 128, "width": 128}
    assert settings["dpi"] == 144


@pytest.mark.parametrize("feature_mode", ["concat", "sequence"])
def test_pages_in_tiles_share_batches_and_keep_their_own_tokens(tmp_path, feature_mode):
    """Pins padding, which is no token, and grids of pages that are cut and of such that are not."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode=feature_mode))
    gundam = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="gundam")
    images = [image(0, 300, 300), image(1, 1300, 700), image(2, 300, 300)]
    for index, each in enumerate(images):
        each.save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    encode(paths, model, tmp_path / "out", image_processor=gundam, batch_size=2, pages_per_file=3)
    pages = load_pages(tmp_path / "out")
    assert pages["patches_grid"][:] == [[1, 1], [1, 2], [1, 1]]
    assert pages["grid"][:] == [[16, 16]] * 3
    for row, expected in zip(pages, model.encode(images, image_processor=gundam), strict=True):
        torch.testing.assert_close(row["tokens"], expected, rtol=0, atol=1e-4)


def test_workers_and_batches_change_nothing(tiny_model, scans, tmp_path):
    """Pins the order of what workers prepare, PDFs that several processes read at once, and what is cast there."""
    tiny_model.to(torch.bfloat16)
    encode(scans, tiny_model, tmp_path / "one")
    summary = encode(scans, tiny_model, tmp_path / "several", num_workers=2, pages_per_file=3)
    assert_same(tmp_path / "several", tmp_path / "one")
    assert 0 < summary.busy < 1


def test_datasets_of_images_and_of_paths(tiny_model, scans, tmp_path):
    """Pins columns of either kind, splits, and rows without an image, which are named."""
    column = datasets.Features(image=datasets.Image())
    cells = [{"bytes": png(0), "path": None}, None, {"bytes": None, "path": str(scans / "1.png")}]
    images = datasets.Dataset.from_dict({"image": cells}, column)
    paths = datasets.Dataset.from_dict({"file": [str(scans / "1.png"), str(scans / "0.png")]})
    images.save_to_disk(tmp_path / "images")
    datasets.DatasetDict(test=paths).save_to_disk(tmp_path / "paths")
    summary = encode(tmp_path / "images", tiny_model, tmp_path / "out")
    assert [(each.page, each.error) for each in summary.problems] == [(1, "ValueError: the row has no image.")]
    encode(tmp_path / "paths", tiny_model, tmp_path / "other", split="test", image_column="file")
    actual = stored(tmp_path / "out") | stored(tmp_path / "other")
    first, second = tiny_model.encode([image(0), image(1)], image_processor=IMAGE_PROCESSOR)
    expected = {("images", 0): first, ("images", 2): second, ("paths", 0): second, ("paths", 1): first}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[place], tokens) for place, tokens in expected.items())
    assert encode(tmp_path / "paths", tiny_model, tmp_path / "out", split="test", image_column="file").num_new == 0


# Going on


def count_pages(model: DeepSeekOCRVisionModel) -> list[int]:
    """A list that grows with the size of each batch that a model encodes."""
    counted: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: counted.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    return counted


def test_what_is_stored_is_not_computed_again_and_more_may_be_added(tiny_model, scans, tmp_path):
    """Pins a second start, and pieces of work that shift when a file comes in between."""
    encode(scans, tiny_model, tmp_path / "out")
    counted = count_pages(tiny_model)
    assert encode(scans, tiny_model, tmp_path / "out").num_new == 0
    assert counted == []
    (scans / "00.png").write_bytes(png(20))
    summary = encode(scans, tiny_model, tmp_path / "out")
    assert (summary.num_pages, summary.num_new, sum(counted)) == (8, 1, 1)
    assert sorted(places(tmp_path / "out", scans)) == sorted([*SEVEN, ("00.png", 0)])


def test_an_encoding_that_was_killed_goes_on_where_it_was(scans, tmp_path, capsys):
    """Pins SIGKILL in the middle of the work, through the command: finished parts stay and can be read at once, and
    nothing is twice, lost or left over.
    """
    save_encoder(tmp_path / "encoder")
    command = ["encode", str(scans), "--model", str(tmp_path / "encoder"), "--out", str(tmp_path / "out")]
    command += ["--workers", "1", "--pages-per-file", "1", "--device", "cpu"]
    replace = os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        if len(list(Path(target).parent.glob("*.parquet"))) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def run_and_die() -> None:
        os.replace = replace_or_die
        main(command)

    killed = multiprocessing.get_context("fork").Process(target=run_and_die)
    killed.start()
    killed.join(timeout=300)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob(".*"))) == 1
    assert places(tmp_path / "out", scans) == SEVEN[:3]
    assert main(command) == 0
    assert "7 pages stored, 4 of them new" in capsys.readouterr().out
    assert all(path.name == "settings.json" or path.suffix == ".parquet" for path in (tmp_path / "out").iterdir())
    model = DeepSeekOCRVisionModel.from_pretrained(tmp_path / "encoder")
    encode(scans, model, tmp_path / "untouched", pages_per_file=1)
    assert_same(tmp_path / "out", tmp_path / "untouched")
    assert places(tmp_path / "out", scans) == SEVEN


def save_encoder(folder: Path) -> None:
    DeepSeekOCRVisionModel(tiny_config()).save_pretrained(folder)
    IMAGE_PROCESSOR.save_pretrained(folder)


def test_processes_that_cut_the_work_differently_store_no_page_twice(tiny_model, scans, tmp_path):
    """Pins a second process, started by hand with other options, or after a file came in, while the first computes."""
    other = DeepSeekOCRVisionModel(tiny_config())
    other.load_state_dict(tiny_model.state_dict())
    handle = tiny_model.register_forward_hook(lambda *_: encode_beside())

    def encode_beside() -> None:
        handle.remove()
        encode([scans / "1.png", scans / "z.png"], other, tmp_path / "out")

    summary = encode(scans, tiny_model, tmp_path / "out", pages_per_file=3)
    assert summary.num_pages == 7
    assert sorted(places(tmp_path / "out", scans)) == SEVEN
    encode(scans, other, tmp_path / "untouched")
    assert_same(tmp_path / "out", tmp_path / "untouched")


def test_other_settings_are_refused_and_named(tiny_model, scans, tmp_path):
    """Pins tokens of two encoders, modes or resolutions in one dataset."""
    encode(scans / "0.png", tiny_model, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    other = DeepSeekOCRVisionImageProcessor("deepseek-ocr", mode="tiny")
    with pytest.raises(ValueError, match=r"image_processor.size.height is 128 there and 512 now.*mode is None there"):
        encode(scans, tiny_model, tmp_path / "out", image_processor=other)
    with pytest.raises(ValueError, match="dpi is 144 there and 72 now"):
        encode(scans, tiny_model, tmp_path / "out", dpi=72)
    with pytest.raises(ValueError, match=r"dtype is 'torch.float32' there and 'torch.bfloat16' now"):
        encode(scans, tiny_model.to(torch.bfloat16), tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no table of tokens, but 'thesis.txt'"):
        encode(scans, tiny_model, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert len(load_pages(tmp_path / "out")) == 1


def test_a_full_disk_leaves_what_was_finished(tiny_model, scans, tmp_path):
    """Pins half a file that passes for a whole one."""
    encode(scans / "0.png", tiny_model, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"out/part-.*\.parquet could not be written: .*File too large"):
            encode(scans, tiny_model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert places(tmp_path / "out", scans) == [("0.png", 0)]
    assert encode(scans, tiny_model, tmp_path / "out").num_new == 6


# What cannot be encoded


def encrypted(pdf: bytes) -> bytes:
    """A PDF that asks for a password, which nobody knows."""
    lock = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >> /ID [<00> <00>]" % (
        b"ab" * 32,
        b"cd" * 32,
    )
    assert pdf.count(b"/Root") == 1
    return pdf.replace(b"/Root", lock + b" /Root")


def test_bad_files_are_named_and_the_rest_is_encoded(tiny_model, scans, tmp_path):
    """Pins one bad file of a million that ends a night's work, and pages that are tried again once they are mended."""
    bad = {
        "broken.pdf": b"%PDF-1.4 and no more",
        "cut.png": png(0)[:3000],
        "locked.pdf": encrypted((scans / "book.pdf").read_bytes()),
        "nothing.png": b"",
    }
    for name, content in bad.items():
        (scans / name).write_bytes(content)
    Image.new("1", (1, 1)).save(scans / "vast.pdf", resolution=1e-3)  # a page of 25 meters
    summary = encode(scans, tiny_model, tmp_path / "out", num_workers=1)
    assert (summary.num_pages, len(summary.problems)) == (7, 5)
    found = errors(tmp_path / "out")
    assert found.keys() == {*bad, "vast.pdf"}
    assert "encrypted or broken" in found["broken.pdf"]
    assert "password" in found["locked.pdf"]
    assert "truncated" in found["cut.png"]
    assert "cannot identify" in found["nothing.png"]
    assert "at 144 dpi the page has" in found["vast.pdf"]
    (scans / "cut.png").write_bytes(png(8))
    assert encode(scans, tiny_model, tmp_path / "out").num_new == 1
    assert errors(tmp_path / "out").keys() == {"broken.pdf", "locked.pdf", "nothing.png", "vast.pdf"}
    assert sorted(places(tmp_path / "out", scans)) == sorted([*SEVEN, ("cut.png", 0)])


def test_a_problem_is_in_the_file_as_soon_as_it_happens(tiny_model, scans, tmp_path):
    """Pins a file that was written every five seconds, so that a kill took what had happened since."""
    (scans / "0.png").write_bytes(png(0)[:3000])
    seen = []
    tiny_model.register_forward_hook(lambda *_: seen.append(errors(tmp_path / "out")))
    encode(scans, tiny_model, tmp_path / "out")
    assert [each.keys() for each in seen] == [{"0.png"}] * 6


def test_a_page_goes_by_its_content(tiny_model, scans, tmp_path):
    """Pins old tokens that pass for those of a changed file, and pages that are computed again under another path."""
    encode(scans, tiny_model, tmp_path / "out")
    scans.rename(tmp_path / "moved")
    (tmp_path / "moved" / "copy of 1.png").write_bytes(png(1))
    counted = count_pages(tiny_model)
    summary = encode(tmp_path / "moved", tiny_model, tmp_path / "out")
    assert (summary.num_pages, summary.num_new, counted) == (8, 0, [])
    (tmp_path / "moved" / "1.png").write_bytes(png(7))
    assert encode(tmp_path / "moved", tiny_model, tmp_path / "out").num_new == 1
    (expected,) = tiny_model.encode([image(7)], image_processor=IMAGE_PROCESSOR)
    assert torch.equal(TokenTable(tmp_path / "out").read(hashlib.sha256(png(7)).hexdigest()), expected)


def test_tokens_that_are_not_finite_are_no_tokens(tiny_model, scans, tmp_path):
    """Pins infinities in float16 that would be trained on for good."""
    with torch.no_grad():
        tiny_model.sam_model.pos_embed.fill_(float("nan"))
    summary = encode(scans / "0.png", tiny_model, tmp_path / "out")
    assert summary.num_pages == 0
    assert "not finite in torch.float32" in errors(tmp_path / "out")["0.png"]


def test_exit_codes_tell_all_some_and_none(scans, tmp_path, capsys):
    """Pins what a script that runs the command goes by."""
    save_encoder(tmp_path / "encoder")

    def run(*inputs: object, out: str, options: tuple[str, ...] = ()) -> int:
        command = ["encode", *map(str, inputs), "--model", str(tmp_path / "encoder"), "--workers", "0"]
        return main([*command, "--device", "cpu", "--out", str(tmp_path / out), *options])

    (scans / "inside" / "2.png").write_bytes(b"")
    assert run(scans / "0.png", out="all") == 0
    assert "1 page stored, 1 of them new" in capsys.readouterr().out
    assert run(scans, out="some", options=("--dtype", "bfloat16", "--batch-size", "2")) == 3
    assert "6 pages stored" in capsys.readouterr().out
    assert run(scans / "inside", out="none") == 1
    assert run(scans / "missing.png", out="nowhere") == 1
    assert "missing.png" in capsys.readouterr().err
    assert run(scans, out="all", options=("--feature-mode", "concat")) == 1
    assert "missing" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


WRONG = {
    "`inputs`": {"inputs": []},
    "`batch_size`": {"batch_size": 0},
    "`num_workers` is -1": {"num_workers": -1},
    "`num_workers` is 0": {"timeout": 1},
    "`pages_per_file`": {"pages_per_file": 1.5},
    "`tokens`": {"tokens": "float8"},
    "`timeout`": {"timeout": 0, "num_workers": 1},
    "`dpi`": {"dpi": 0},
    "There are no images": {"inputs": [ROOT / "configuration"]},
    "no file, folder or dataset '/nowhere": {"inputs": ["/nowhere/at all"]},
    "no file, folder or dataset 'nobody": {"inputs": ["nobody/nothing"]},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_argument_is_named(tiny_model, scans, tmp_path, words):
    """Pins errors before anything is computed or written."""
    arguments = {"inputs": [scans]} | WRONG[words]
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=words):
        encode(arguments.pop("inputs"), tiny_model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
