"""`deepseek-ocr-vision read` and what is under it: pages and documents to text, token by token."""

import pytest
import torch
from PIL import Image
from whole_model import tiny_whole_model, write_released

from deepseek_ocr_vision.__main__ import FAILED, SOME_FAILED, main
from deepseek_ocr_vision.composites import PROMPTS
from deepseek_ocr_vision.composites.read_pages import load_reader, prompt_of, read_page


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released checkpoint whose model writes letters: those of an untrained one are mostly broken bytes."""
    torch.manual_seed(0)
    model = tiny_whole_model()
    letters = [model.config.text_config.vocab_size - 256 + 32 + index for index in range(26)]
    with torch.no_grad():
        chosen = torch.zeros(model.config.text_config.vocab_size, 1)
        chosen[letters] = 1.0
        model.lm_head.weight.mul_(chosen)
    return write_released(tmp_path_factory.mktemp("read") / "released", model)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.png"
    Image.linear_gradient("L").resize((700, 300)).save(path)
    return path


def test_pages_are_written_to_the_standard_output(released, page, tmp_path, capsys):
    """Pins the command from pages to text, one after the other, and that names go elsewhere."""
    second = tmp_path / "second.png"
    Image.radial_gradient("L").save(second)
    options = ["--model", str(released), "--mode", "tiny", "--prompt", "text", "--max-new-tokens", "12"]
    assert main(["read", str(page), str(second), *options]) == 0
    output = capsys.readouterr()
    model, processor = load_reader(released, mode="tiny", device="cpu")
    choices = {"prompt": "text", "max_new_tokens": 12}
    texts = [read_page(model, processor, path, **choices) for path in (page, second)]
    assert all(texts)
    assert output.out.split() == " ".join(texts).split()
    assert "page.png, page 1" in output.err


def test_pages_of_a_pdf_are_read(released, tmp_path, capsys):
    """Pins documents, page by page."""
    pytest.importorskip("pypdfium2")
    pages = [Image.new("RGB", (200, 100), color) for color in ("white", "black")]
    pages[0].save(tmp_path / "two.pdf", save_all=True, append_images=pages[1:])
    options = ["--model", str(released), "--mode", "tiny", "--max-new-tokens", "4", "--ngram-size", "0"]
    assert main(["read", str(tmp_path / "two.pdf"), *options]) == 0
    assert "two.pdf, page 2" in capsys.readouterr().err


def test_a_page_that_cannot_be_read_is_named_and_the_others_are_read(released, page, tmp_path, capsys):
    """Pins the exit code, and a broken file that would have stopped a night's work."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    options = ["--model", str(released), "--mode", "tiny", "--max-new-tokens", "2"]
    assert main(["read", str(page), str(tmp_path / "broken.png"), *options]) == SOME_FAILED
    assert "broken.png" in capsys.readouterr().err
    assert main(["read", str(tmp_path / "broken.png"), *options]) == FAILED
    assert main(["read", str(tmp_path / "none.png"), *options]) == FAILED
    assert main(["read", str(page), *options, "--prompt", "no image in it"]) == FAILED
    assert "it has to hold <image> once" in capsys.readouterr().err


def test_a_prompt_is_known_by_its_name_or_given_in_full():
    """Pins the spaces at the ends, which the released `infer` takes off."""
    assert prompt_of("text") == PROMPTS["text"]
    assert prompt_of("<image>\nFree OCR. ") == PROMPTS["text"]


def test_a_page_for_which_there_is_no_room_is_an_error(released, page):
    """Pins more image tokens than the language model has positions."""
    model, processor = load_reader(released, mode="large")
    model.config.text_config.max_position_embeddings = 400
    with pytest.raises(ValueError, match="the model has 400 positions"):
        read_page(model, processor, page)
    with pytest.raises(ValueError, match="`max_new_tokens` is 0"):
        read_page(*load_reader(released, mode="tiny"), page, max_new_tokens=0)
