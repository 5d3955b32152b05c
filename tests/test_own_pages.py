"""The user's own pages in `examples/finetune.py`: opened, looked at before training, split, and sized."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepseek_ocr_vision.composites import build_processor


datasets = pytest.importorskip("datasets", reason="the extra `train` is not installed")
pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
pytest.importorskip("rapidfuzz", reason="the extra `train` is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning import data, inspection, own_pages, splits  # noqa: E402
from finetuning.arguments import ModelArguments, PageArguments  # noqa: E402
from receipts import draw_receipt, read_metadata, text_of, write_metadata, write_receipts  # noqa: E402


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of eight receipts."""
    return write_receipts(tmp_path / "my pages", 8)


def load(source, *, seed: int = 0, **options) -> tuple[dict, data.Plan]:
    """Pages as the example loads them, with a small new model."""
    chosen = PageArguments(data=str(source), held_out_fraction=0.25, **options)
    pages, _, plan = data.load_pages(chosen, ModelArguments(), seed=seed, show_progress=False)
    return pages, plan


def texts(pages) -> list[str]:
    return [page["text"] for page in pages]


def refusal(source, **options) -> str:
    """Why data is refused."""
    with pytest.raises(ValueError, match="cannot be trained on") as caught:
        load(source, **options)
    return str(caught.value)


# Opening


def test_own_pages_keep_their_images_with_their_texts_and_are_held_out_once(folder):
    """Images in the order of the file system, or a page on both sides, would spoil the training or the measure."""
    pages, _ = load(folder)
    assert [len(pages[side]) for side in ("train", "held_out")] == [6, 2]
    found = {page["text"]: page["image"].tobytes() for side in pages.values() for page in side}
    assert found == {text_of(index): draw_receipt(text_of(index)).tobytes() for index in range(8)}


def test_a_number_in_a_csv_stays_the_text_that_it_is(folder):
    """Pins `00015`, which readers of tables turn into 15."""
    names = [row["file_name"] for row in read_metadata(folder)]
    (folder / "metadata.jsonl").unlink()
    lines = [f'{name},"{index:05}"' if index else f'{name},"two\nlines"' for index, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]), "utf-8")
    pages, _ = load(folder)
    found = sorted(texts(pages["train"]) + texts(pages["held_out"]))
    assert found == [*(f"{index:05}" for index in range(1, 8)), "two\nlines"]


def test_a_byte_order_mark_and_a_line_separator_in_a_string_are_read_and_reported(folder):
    """Pins a first line that is no JSON, and one that is cut in two at U+2028."""
    rows = read_metadata(folder)
    rows[2]["text"] = "one\u2028two"
    write_metadata(folder, rows)
    content = (folder / "metadata.jsonl").read_bytes()
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    pages, plan = load(folder)
    assert "one\u2028two" in texts(pages["train"]) + texts(pages["held_out"])
    assert any("byte-order mark" in line for line in plan.warnings)
    assert any("invisible characters" in line and "line 3 (U+2028)" in line for line in plan.warnings)


@pytest.mark.parametrize("is_split", [False, True])
def test_a_folder_that_save_to_disk_wrote_opens(folder, tmp_path, is_split):
    """Pins `load_dataset`, which refuses such a folder or reads its files as plain Arrow."""
    rows = [{"image": str(folder / row["file_name"]), "text": row["text"]} for row in read_metadata(folder)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    if is_split:
        table = datasets.DatasetDict({"train": table.select(range(5)), "validation": table.select(range(5, 8))})
    table.save_to_disk(str(tmp_path / "saved"))
    pages, _ = load(tmp_path / "saved")
    assert len(pages["train"]) == (5 if is_split else 6)
    if is_split:
        assert texts(pages["held_out"]) == [text_of(index) for index in (5, 6, 7)]
    first = pages["train"][0]
    assert first["image"].tobytes() == draw_receipt(first["text"]).tobytes()


def test_a_dataset_that_datasets_opens_keeps_its_own_split(folder, tmp_path, monkeypatch):
    """Splitting anew would train on the pages that the user holds out."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"scan": str(folder / "scans" / f"{index}.png"), "says": str(index)} for index in range(8)]
    (tmp_path / "tables").mkdir()
    for split, part in (("train", rows[:5]), ("validation", rows[5:])):
        datasets.Dataset.from_list(part).to_parquet(str(tmp_path / "tables" / f"{split}.parquet"))
    pages, _ = load(tmp_path / "tables", image_column="scan", text_column="says")
    assert texts(pages["train"]) == list("01234")
    assert texts(pages["held_out"]) == list("567")
    assert pages["train"][0]["image"].size == (200, 140)


@pytest.mark.parametrize("mode", ["CMYK", "LA", "P", "1", "I;16"])
def test_images_of_any_mode_become_rgb(folder, mode):
    """Pins the image of a CMYK page, which could not be written as PNG once training was over."""
    image = draw_receipt(text_of(0))
    name = "scans/0.tif"
    (image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(folder / name)
    rows = read_metadata(folder)
    rows[0]["file_name"] = name
    write_metadata(folder, rows)
    pages, _ = load(folder)
    found = [page["image"] for side in pages.values() for page in side]
    assert {image.mode for image in found} == {"RGB"}


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        ('{"file_name": "scans/0.png", "words": "1"}\n' * 4, {}, "no column 'text'.*--text_column"),
        ('{"file_name": "scans/0.png", "text": "1"}\n' * 4, {"image_column": "scan"}, "--image_column"),
        ('{"text": "1"}\n', {}, "no column 'file_name'"),
        ("", {}, "0 pages"),
        ('{"file_name": "scans/0.png", "text": "1"}\n', {}, "at least 2"),
        ('{"file_name": "scans/0.png", "text": "1"}\n' * 4, {}, "none can be held out"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_the_reason(folder, metadata, options, message):
    """Each of these was a KeyError, an empty loader, or a crash in the middle of training."""
    (folder / "metadata.jsonl").write_text(metadata)
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    """`datasets` would look for a data set of that name on the Hub."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


# Looking


MISTAKES = [
    ('{"file_name": "scans/0.png", "text": ""}', r"texts that are empty or blank: \S+metadata.jsonl, line 1 \(''\)"),
    ('{"file_name": "scans/1.png", "text": " \\n"}', r"line 2 \(' \\n'\)"),
    ('{"file_name": "scans/2.png", "text": null}', r"texts that are missing: \S+metadata.jsonl, line 3"),
    ('{"file_name": "scans/3.png", "text": 15}', r"texts that are no strings.*line 4 \(15\)"),
    ('{"file_name": "scans/4.png", "text": "an <image>"}', r"special token.*line 5 \(<image>\)"),
    ('{"file_name": "scans/5.png", "text": "the <eos>"}', r"line 6 \(<eos>\)"),
    ('{"file_name": "scans/99.png", "text": "1"}', r"images that cannot be read.*line 7 \(FileNotFoundError"),
    ('{"file_name": "scans/cut.png", "text": "2"}', r"line 8 \(\w+Error"),
    ('{"file_name": "scans/no.png", "text": "3"}', r"line 9 \(OSError: .*cannot identify an image"),
    ('{"file_name": "../secret.png", "text": "4"}', r"not in the folder of the data: \S+metadata.jsonl, line 10"),
    ('{"file_name": "scans/6.png"', r"not JSON in UTF-8: \S+metadata.jsonl, line 11"),
    ('["scans/6.png"]', r"not JSON objects: \S+metadata.jsonl, line 12"),
    ('{"file_name": "scans/7.png", "text": "' + "x" * 2100 + '"}', r"longer than the language model's 2048.*line 13"),
]


def test_every_mistake_in_the_data_is_named_with_its_line_and_all_at_once(tmp_path):
    """Pins a run that stops at the first mistake, or in the middle of training, with no place in the user's file."""
    folder = write_receipts(tmp_path / "pages", 8)
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    (folder / "scans" / "cut.png").write_bytes((folder / "scans" / "0.png").read_bytes()[:300])
    (folder / "scans" / "no.png").write_text("no image")
    write_metadata(folder, [line for line, _ in MISTAKES])
    message = refusal(folder).replace(str(folder), "pages")
    for _, expected in MISTAKES:
        assert re.search(expected, message), expected
    assert message.count("\n- ") == 9, message


def test_many_mistakes_of_a_kind_are_counted_and_not_all_listed(tmp_path):
    """Pins a message of thousands of lines."""
    folder = write_receipts(tmp_path / "pages", 1)
    write_metadata(folder, [{"file_name": "scans/0.png", "text": ""}] * 70)
    message = refusal(folder)
    assert "70 texts that are empty or blank" in message
    assert message.endswith("and 50 more")
    assert len(message) < 5000


def test_characters_that_the_tokenizer_does_not_know_are_counted(folder):
    """Pins a language model that is taught to write something else than what stands on the page."""
    words = {"[UNK]": 0, "<eos>": 1, "<image>": 2, "No": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = build_processor()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<eos>")
    table = own_pages.Table([folder / "scans" / "0.png"] * 2, ["No", "No 漢"], ["here", "there"])
    look = inspection.inspect(table, name="train", processor=processor, show_progress=False)
    (finding,) = look.findings
    assert (finding.place, finding.is_error) == ("there", False)
    assert "U+6F22" in finding.detail


def test_pages_held_out_by_the_data_that_are_trained_on_too_are_reported(tmp_path):
    """Pins a score on pages that the model knows by heart."""
    folder = write_receipts(tmp_path / "pages", 6, names=("train/{}.png", "train/{}.png", "validation/{}.png"))
    rows = read_metadata(folder)
    (folder / rows[2]["file_name"]).write_bytes((folder / rows[0]["file_name"]).read_bytes())
    rows[5]["text"] = rows[1]["text"]
    write_metadata(folder, rows)
    _, plan = load(folder)
    assert any("image is trained on too" in line and "line 3" in line for line in plan.warnings)
    assert any("text is trained on, on another image" in line and "line 6" in line for line in plan.warnings)


# Splits


@pytest.mark.parametrize(
    ("names", "held_out"),
    [
        (("train/{}.png", "validation/{}.png"), {1, 3, 5, 7}),
        (("training/{}.png", "val/a/{}.png"), {1, 3, 5, 7}),
        (("train/{}.png", "dev/{}.png", "test/{}.png"), {1, 4, 7}),
    ],
)
def test_a_split_in_the_names_of_the_images_is_the_datas_own(tmp_path, names, held_out):
    """Pins one `metadata.jsonl` whose validation pages were shuffled among those to train on."""
    folder = write_receipts(tmp_path / "pages", 8, names=names)
    pages, plan = load(folder)
    assert set(texts(pages["held_out"])) == {text_of(index) for index in held_out}
    assert not set(texts(pages["train"])) & set(texts(pages["held_out"]))
    assert ("The split 'test', 2 pages, is not used." in plan.notes) == (len(names) == 3)


def test_a_split_in_files_or_in_a_column_is_the_datas_own(tmp_path):
    """Pins the other two ways in which people write a split down."""
    for split, number in (("train", 5), ("valid", 2)):
        write_receipts(tmp_path / "files" / split, number)
    pages, _ = load(tmp_path / "files")
    assert [len(pages[side]) for side in ("train", "held_out")] == [5, 2]
    folder = write_receipts(tmp_path / "column", 6)
    rows = read_metadata(folder)
    write_metadata(folder, [row | {"split": "train" if index else "test"} for index, row in enumerate(rows)])
    pages, _ = load(folder)
    assert texts(pages["held_out"]) == [text_of(0)]


def test_a_row_outside_of_a_split_that_the_others_name_is_an_error(tmp_path):
    """Pins pages that silently go to one side or are left out."""
    folder = write_receipts(tmp_path / "pages", 6, names=("train/{}.png", "validation/{}.png", "scans/{}.png"))
    assert re.search(r"2 rows in no split.*line 3; \S.*line 6", refusal(folder))


def test_duplicates_stay_on_one_side_of_a_random_split():
    """Pins a held-out page whose image or text was trained on, under another name."""
    digests = ["a", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"]
    written = ["1", "2", "2", "3", "3", "4", "5", "6", "7", "8", "9", "10"]
    held_out_sizes = set()
    for seed in range(20):
        train, held_out = splits.random_split(digests, written, fraction=0.25, seed=seed)
        assert sorted(train + held_out) == list(range(12))
        for values in (digests, written):
            assert not {values[row] for row in train} & {values[row] for row in held_out}
        held_out_sizes.add(len(held_out))
    assert held_out_sizes == {3}
    assert splits.random_split(digests, written, fraction=0.25, seed=1) == splits.random_split(
        digests, written, fraction=0.25, seed=1
    )


# Sizes


def test_a_large_page_gets_as_many_pixels_as_its_text_needs(tmp_path):
    """Pins a page of 3000 x 3000 pixels that became four tokens without a word."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for index in range(4):
        small = draw_receipt(text_of(index))
        page = Image.new("RGB", (1500, 1500), "white")
        page.paste(small, (50 * index, 700))
        page.save(folder / f"{index}.png")
    write_metadata(folder, [{"file_name": f"{index}.png", "text": text_of(index)} for index in range(4)])
    _, plan = load(folder)
    assert 768 <= plan.page_size <= 1280
    assert (
        f"A page is {plan.page_size} x {plan.page_size} pixels, {(plan.page_size // 64) ** 2} tokens" in plan.notes[1]
    )
    assert plan.warnings == []
    _, plan = load(folder, page_size=128)
    assert any("too small to be read" in line for line in plan.warnings)


def test_a_crowded_page_is_warned_of(tmp_path):
    """Pins text that no encoder could squeeze into the tokens of the page."""
    folder = write_receipts(tmp_path / "pages", 4)
    rows = read_metadata(folder)
    write_metadata(folder, [row | {"text": f"{index} " + "word " * 300} for index, row in enumerate(rows)])
    _, plan = load(folder, page_size=128)
    assert any("more than 10 tokens of text" in line for line in plan.warnings)


def test_pages_of_two_kinds_that_take_turns_are_both_measured():
    """Pins every 78th of 5,000 pages: of receipts between other pages, none was looked at."""
    rows = inspection.measured_rows(5_000)
    assert len(rows) == inspection.NUM_MEASURED_PAGES
    for period in (2, 3, 6):
        assert {row % period for row in rows} == set(range(period))
    assert inspection.measured_rows(5) == set(range(5))


# Content


def test_pages_replaced_under_the_same_path_are_other_data(folder):
    """Pins "finished; keeping it": old scores under new images."""
    before = load(folder)[1].content
    assert load(folder)[1].content == before
    path = folder / "scans" / "3.png"
    image = Image.open(path).copy()
    image.putpixel((100, 100), (1, 2, 3))
    image.save(path)
    assert load(folder)[1].content != before


def test_a_text_that_was_mended_is_other_data(folder):
    """Pins the same for texts."""
    before = load(folder)[1].content
    rows = read_metadata(folder)
    write_metadata(folder, [*rows[:-1], rows[-1] | {"text": "another"}])
    assert load(folder)[1].content != before
