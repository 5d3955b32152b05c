"""The demo: what it answers, and the page itself, clicked on in a headless Chromium."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config
from PIL import Image, ImageDraw
from whole_model import needs_whole_model, tiny_whole_model, write_released

from deepseek_ocr_vision import MODES, DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel


# Gradio asks for its telemetry and for a newer version of itself when it is imported, if nobody forbids it.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gr = pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'deepseek-ocr-vision[demo]'")

import httpx  # noqa: E402
from gradio.data_classes import ImageData  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402

from deepseek_ocr_vision import app  # noqa: E402


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# As root, in a container, and with nothing of a browser's own that reaches for the network.
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_ARGUMENTS += ["--disable-background-networking", "--disable-component-update"]
PATIENCE = 60_000  # milliseconds
SIDE = 256


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny encoder on disk, whose image processor makes pages of 4 x 4 tokens."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    DeepSeekOCRVisionModel(tiny_config(feature_mode="concat")).save_pretrained(folder)
    DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=SIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint):
    """The same, as the demo loads it."""
    return app.Encoder(str(checkpoint))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A page with a word in the upper left and a block in the lower right."""
    page = Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(page)
    draw.text((110, 90), "word", fill="black", font_size=40)
    draw.rectangle((310, 235, 390, 290), fill="black")
    path = tmp_path_factory.mktemp("pages") / "page.png"
    page.save(path)
    return str(path)


def counted(table: str) -> dict[str, int]:
    """The number of tokens of each mode in a table."""
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    return {row[0]: int(row[2]) for row in rows[2:]}


# Without a browser


def test_nothing_is_loaded_before_a_page_is_shown():
    """Pins a Space that fetches 0.8 GB, or fails, when its file is imported."""
    assert vars(app.Encoder("no/such-model")) == {"source": "no/such-model"}
    app.build_demo(app.Encoder("no/such-model"))


def test_a_page_gives_images_of_its_size_about_the_token_with_the_most_on_it(encoder, image):
    """Pins images in the size of what the encoder read, on which clicks would miss their token."""
    view, token, *images, caption, table = app.show(encoder, image, app.AS_SAVED)
    assert token == view.richest_token()
    assert [shown.size for shown in images] == [(400, 300)] * 4
    assert f"Row {token[0]}, column {token[1]}" in caption
    assert f"**{app.AS_SAVED}** | **{SIDE} x {SIDE}** | **16**" in table


def test_a_click_chooses_the_token_under_it(encoder, image):
    """Pins row and column, or x and y, the wrong way round."""
    view, first, *images, _, _ = app.show(encoder, image, app.AS_SAVED)
    token, page, neighbours, gradient, caption = app.choose(view, SimpleNamespace(index=[350, 20]))
    assert token == (0, 3) != first
    assert "Row 0, column 3" in caption
    for before, after in zip((images[0], images[2], images[3]), (page, neighbours, gradient), strict=True):
        assert before.tobytes() != after.tobytes()


def test_neighbours_are_the_most_similar_tokens_on_the_page():
    """Pins the token itself, or a margin that is all alike, among its neighbours."""
    similarity = torch.tensor([[1.0, 0.2, 0.9], [0.7, -0.5, 0.99]])
    on_page = torch.tensor([[True, True, True], [True, True, False]])
    words = app.describe((0, 0), similarity, on_page)
    assert words.endswith("Most like it: (0, 2) 0.90, (1, 0) 0.70, (0, 1) 0.20, (1, 1) -0.50.")
    only = torch.zeros(2, 3, dtype=torch.bool)
    assert app.describe((0, 0), similarity, only).endswith("counted from 0.")


def test_tokens_are_counted_as_the_model_gives_them(encoder, checkpoint):
    """Pins a table of the modes' sizes that forgets tiles, or the marks of the released sequence."""
    counts = counted(app.count_tokens(encoder, (1240, 1754), "tiny"))
    assert counts == {app.AS_SAVED: 16, "tiny": 64, "small": 100, "base": 256, "large": 400, "gundam": 856}
    sequence = app.Encoder(str(checkpoint))
    sequence.model.config.feature_mode = "sequence"
    assert counted(app.count_tokens(sequence, (1240, 1754), "tiny"))["gundam"] == 30 * 21 + 16 * 17 + 1


@pytest.mark.parametrize("preset", ["deepseek-ocr", "deepseek-ocr-encoder"])
def test_every_mode_is_there_with_either_preset(tmp_path, preset):
    """Pins `mode=` for a preset that has no modes, which is an error."""
    DeepSeekOCRVisionModel(tiny_config()).save_pretrained(tmp_path)
    DeepSeekOCRVisionImageProcessor(preset, size=SIDE).save_pretrained(tmp_path)
    encoder = app.Encoder(str(tmp_path))
    for name, mode in MODES.items():
        processor = encoder.processor_in(name)
        assert (processor.size["height"], processor.tile_size) == (mode.size, mode.tile_size)
        assert processor.image_mean == encoder.image_processor.image_mean
    assert encoder.processor_in(app.AS_SAVED).size["height"] == SIDE


def test_a_large_page_is_drawn_smaller_and_read_as_it_is(encoder, tmp_path):
    """Pins images of 50 megabytes sent to the browser, and tokens of a page that was shrunk before."""
    page = Image.radial_gradient("L").resize((3200, 1600)).convert("RGB")
    page.save(tmp_path / "page.png")
    view = app.show(encoder, str(tmp_path / "page.png"), app.AS_SAVED)[0]
    assert view.page.size == (app.LONGEST_SIDE, app.LONGEST_SIDE // 2)
    expected = encoder.image_processor(page, return_tensors="pt").pixel_values[0]
    assert torch.equal(view.pixel_values.cpu(), expected)


def test_what_goes_wrong_is_told_in_words(encoder, tmp_path, image):
    """Pins a bare "Error", which is all that Gradio shows of other exceptions on a Space."""
    (tmp_path / "page.png").write_bytes(b"no image")
    (tmp_path / "huge.pgm").write_bytes(b"P5 20000 20000 255\n")
    cases = [
        (None, "There is no page yet"),
        (tmp_path / "page.png", "cannot identify"),
        (tmp_path / "huge.pgm", "limit"),
    ]
    for path, words in cases:
        with pytest.raises(gr.Error, match=words):
            app.show(encoder, path and str(path), app.AS_SAVED)
    with pytest.raises(gr.Error, match="show it again"):
        app.choose(None, SimpleNamespace(index=[0, 0]))
    with pytest.raises(gr.Error, match="show it again"):
        app.sheet_of(None, (0, 0))
    with pytest.raises(gr.Error, match="no-such-folder"):
        app.show(app.Encoder(str(tmp_path / "no-such-folder")), image, app.AS_SAVED)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny whole model on disk, as a released one."""
    torch.manual_seed(0)
    return write_released(tmp_path_factory.mktemp("whole") / "model", tiny_whole_model())


@needs_whole_model
def test_a_page_is_read_and_its_text_shown_as_it_comes(released, image):
    """Pins a page whose text appears only once all of it is there, or in another resolution than the chosen one."""
    from deepseek_ocr_vision.composites.read_pages import load_reader, read_page

    steps = list(app.read(app.Reader(str(released)), image, "tiny", "text"))
    model, processor = load_reader(released, mode="tiny", device="cpu")
    assert steps[-1] == read_page(model, processor, image, prompt="text")
    assert len(steps) > 3
    assert steps[-1].startswith(steps[1].strip())


@needs_whole_model
def test_what_cannot_be_read_is_told_in_words(checkpoint, released, tmp_path, image):
    """Pins an encoder asked for text, and a browser that waits for ever for a thread that has failed."""
    assert app.Reader(str(released)).is_there
    assert not app.Reader(str(checkpoint)).is_there
    (tmp_path / "page.png").write_bytes(b"no picture")
    cases = [(released, None, "There is no page yet"), (released, tmp_path / "page.png", "cannot identify")]
    cases += [(checkpoint, image, "no whole DeepSeek-OCR"), (tmp_path / "no-such-folder", image, "no-such-folder")]
    for source, path, words in cases:
        with pytest.raises(gr.Error, match=words):
            list(app.read(app.Reader(str(source)), path and str(path), "tiny", "text"))
    with pytest.raises(gr.Error, match="<image> once"):
        list(app.read(app.Reader(str(released)), image, "tiny", "no such prompt"))


def test_a_model_that_cannot_be_loaded_ends_the_command(tmp_path, capsys):
    """Pins a demo that starts, and tells its first visitor about a mistyped folder."""
    assert app.main(["--model", str(tmp_path / "missing")]) == 1
    assert "missing" in capsys.readouterr().err


# By HTTP, as a script would ask


@pytest.fixture(scope="module")
def served(encoder):
    """The demo at a port that is free: its address, and the number of the function that reads a page."""
    demo = app.build_demo(encoder)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    (show, *_) = (
        number for number, each in demo.fns.items() if [type(x) for x in each.inputs] == [gr.Image, gr.Radio]
    )
    yield f"{url}gradio_api", show
    demo.close(verbose=False)


def ask(served: tuple[str, int], file: dict) -> dict:
    """What the demo answers to a request about a file, in the last of its events."""
    url, show = served
    session = f"session-{time.monotonic_ns()}"
    request = {"data": [file, app.AS_SAVED], "fn_index": show, "session_hash": session}
    httpx.post(f"{url}/queue/join", json=request, timeout=60).raise_for_status()
    with httpx.stream("GET", f"{url}/queue/data", params={"session_hash": session}, timeout=60) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("the demo did not answer")


def upload(served: tuple[str, int], path: str) -> str:
    """Upload a file; the path that the demo gives it."""
    with open(path, "rb") as file:
        answer = httpx.post(f"{served[0]}/upload", files={"files": file}, timeout=60)
    (uploaded,) = answer.raise_for_status().json()
    return uploaded


META = {"_type": "gradio.FileData"}


@pytest.mark.parametrize("extra", [{}, {"meta": META}, {"orig_name": "page.svg"}, {"url": "/elsewhere", "size": 5}])
def test_a_request_that_names_a_file_of_the_server_is_refused(served, image, extra):
    """Pins requests without `meta`, which pass Gradio's own check: the page came back with the pixels of any file."""
    answer = ask(served, {"path": image} | extra)
    assert answer["success"] is False
    assert "data" not in answer["output"]


def test_every_event_that_takes_an_image_refuses_what_was_not_uploaded(encoder, image):
    """Pins a second tab, whose button would ask Gradio's own check, which any path passes."""
    demo = app.build_demo(encoder)
    taken = {id(each): each for event in demo.fns.values() for each in event.inputs if isinstance(each, gr.Image)}
    assert taken
    for component in taken.values():
        with pytest.raises(gr.Error, match="has to be an uploaded file"):
            component.preprocess(ImageData(path=image))


@pytest.fixture
def link_in_uploads(served, image):
    """A link among the uploads that leads to a file which was not uploaded."""
    link = Path(upload(served, image)).with_name(f"link-{time.monotonic_ns()}.png")
    link.symlink_to(image)
    yield link
    link.unlink()


def test_a_path_that_leads_out_of_the_uploads_is_refused(served, image, link_in_uploads):
    """Pins a check of the beginning of a path, which `..`, a link and a folder beside it pass."""
    folder = link_in_uploads.parent
    beside = f"{get_upload_folder()}-private/page.png"
    paths = [
        f"{folder}/../../..{image}",
        link_in_uploads,
        beside,
        folder,
        "",
        "page.png",
        "\0",
        "x" * 5000,
        "/dev/zero",
    ]
    for path in paths:
        answer = ask(served, {"path": str(path)})
        assert answer["success"] is False, path
        assert answer["output"]["error"] == "The page has to be an uploaded file.", path


def test_an_uploaded_file_is_read(served, image):
    """Pins a check that refuses what it is for."""
    answer = ask(served, {"path": upload(served, image), "meta": META})
    assert answer["success"] is True
    assert "Row " in json.dumps(answer["output"]["data"])


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(served, tmp_path):
    """Pins 12 KB that hold the worker for 24 seconds: 10,000 x 10,000 pixels of one colour."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "page.png")
    start = time.monotonic()
    answer = ask(served, {"path": upload(served, tmp_path / "page.png")})
    assert answer["success"] is False
    assert "10000 x 10000" in answer["output"]["error"]
    assert time.monotonic() - start < 10


# In a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium with a profile of its own."""
    reason = "Playwright is not installed: pip install playwright"
    sync_playwright = pytest.importorskip("playwright.sync_api", reason=reason).sync_playwright
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(encoder, browser):
    """The demo, opened in the browser, and the addresses that it asks for."""
    yield from open_demo(encoder, browser)


def open_demo(encoder, browser):
    """The demo of an encoder in the browser, at any port that is free."""
    demo = app.build_demo(encoder)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.set_default_timeout(PATIENCE)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    yield page, requests, url
    page.close()
    demo.close(verbose=False)


def source(page, name: str) -> str:
    """Where the browser has an image from; another image has another address."""
    return page.locator(f"#{name} img").first.get_attribute("src")


def click_at(page, name: str, across: float, down: float) -> None:
    """Click on an image, at parts of its width and height; around it there may be empty space."""
    box = page.locator(f"#{name} img").first.bounding_box()
    # The image is fitted into its place, in the middle.
    scale = min(box["width"] / 400, box["height"] / 300)
    x = box["x"] + box["width"] / 2 + (across - 0.5) * 400 * scale
    y = box["y"] + box["height"] / 2 + (down - 0.5) * 300 * scale
    page.mouse.click(x, y)


def wait_for_caption(page, words: str) -> None:
    """Wait until the caption over the images has some words."""
    page.wait_for_function(
        "words => document.querySelector('#caption').innerText.includes(words)", arg=words, timeout=PATIENCE
    )


def test_a_page_is_uploaded_and_its_tokens_are_clicked(opened, image):
    """Pins wiring that only a browser shows: the clicks' coordinates, the order of outputs, requests elsewhere."""
    page, requests, url = opened
    page.click("#show")
    page.get_by_text("There is no page yet").wait_for()

    page.set_input_files("#image input[type=file]", image)
    page.locator("#sheet img").wait_for()
    sheet = source(page, "sheet")
    assert "256 x 256" in page.inner_text("#counts")
    assert re.search(r"gundam\s+1024 x 1024 \+ tiles\s+256", page.inner_text("#counts"))

    for name, place in {"page": (0, 3), "colors": (2, 0), "neighbours": (3, 1), "gradient": (1, 2)}.items():
        before = [source(page, shown) for shown in ("page", "neighbours", "gradient")]
        colors = source(page, "colors")
        click_at(page, name, (place[1] + 0.5) / 4, (place[0] + 0.5) / 4)
        wait_for_caption(page, f"Row {place[0]}, column {place[1]} of 4 x 4")
        after = [source(page, shown) for shown in ("page", "neighbours", "gradient")]
        assert all(old != new for old, new in zip(before, after, strict=True))
        assert source(page, "colors") == colors

    page.click("#draw-sheet")
    page.wait_for_function("old => document.querySelector('#sheet img').src !== old", arg=sheet)
    assert [address for address in requests if not address.startswith((url, "data:", "blob:"))] == []


def test_an_example_is_shown_in_another_mode(opened):
    """Pins examples that only fill the upload, and a mode that the encoder never hears of."""
    page, _, _ = opened
    page.get_by_label("tiny").check()
    page.locator("#examples button, #examples img").first.click()
    wait_for_caption(page, "of 8 x 8")
    assert "64" in page.locator("#counts strong").all_inner_texts()
    page.locator("#sheet img").wait_for()


@needs_whole_model
def test_the_page_is_read_on_the_second_tab(released, browser, image):
    """Pins the second tab, which takes the page and the resolution of the first."""
    opening = open_demo(app.Encoder(str(released)), browser)
    page, _, _ = next(opening)
    page.get_by_label("tiny").check()
    page.get_by_role("tab", name="What is written there").click()
    page.click("#read")
    page.get_by_text("There is no page yet").wait_for()
    page.set_input_files("#image input[type=file]", image)
    page.locator("#image img").wait_for()
    page.click("#read")
    page.wait_for_function("() => document.querySelector('#text textarea').value.length > 0", timeout=PATIENCE)
    next(opening, None)
