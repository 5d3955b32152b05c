"""Seeing what the encoder sees: the numbers, their place on the page, the sheet and the command."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, TOLERANCE, pixels, relative_error, tiny_config
from PIL import Image, ImageDraw
from torch import nn

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel
from deepseek_ocr_vision.__main__ import main
from deepseek_ocr_vision.saving.staging import PREFIX
from deepseek_ocr_vision.visualize import draw_sheet, pca_colors, pixel_gradient, view_page
from deepseek_ocr_vision.visualize.maps import on_grid
from deepseek_ocr_vision.visualize.pages import save_image


matplotlib = pytest.importorskip("matplotlib", reason="the extra `train` is not installed")

GREY = (127, 127, 127)
WIDE, HIGH = (300, 120), (90, 200)
MARK = 20  # side in pixels


def marked_page(size: tuple[int, int], corner: str, *, paper: tuple[int, int, int] = GREY) -> Image.Image:
    """A page of one colour with a black square near one corner, such as `"bottom right"`."""
    page = Image.new("RGB", size, paper)
    left = 4 if "left" in corner else size[0] - 4 - MARK
    top = 4 if "top" in corner else size[1] - 4 - MARK
    ImageDraw.Draw(page).rectangle((left, top, left + MARK - 1, top + MARK - 1), fill="black")
    return page


def mark_of(page: Image.Image) -> np.ndarray:
    """Where the mark is, [height, width]."""
    return np.asarray(page.convert("L")) == 0


@pytest.fixture
def image_processor():
    """Stretches a page to 4 x 4 tokens; middle grey is very nearly 0."""
    return DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=256)


@pytest.fixture
def view(tiny_model, image_processor):
    """A page of 4 x 4 tokens as the tiny model sees it."""
    page = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    return view_page(tiny_model, page, image_processor=image_processor)


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    """A tiny model on disk, and its image processor."""
    tiny_model.save_pretrained(tmp_path / "model")
    DeepSeekOCRVisionImageProcessor(size=256).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# PCA


def test_the_colours_do_not_depend_on_sign_and_rotation_of_the_tokens_space():
    """Pins components of arbitrary sign, which another machine's linear algebra would give in other colours."""
    tokens = torch.randn(6, 5, 16) * torch.arange(1, 17)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    expected = pca_colors(tokens)
    assert expected.shape == (6, 5, 3)
    for same in (-tokens, tokens @ rotation, tokens + 3, tokens * 7):
        assert torch.allclose(pca_colors(same), expected, atol=1e-4)


def test_a_token_far_from_all_others_leaves_them_their_contrast():
    """Pins a scale from the least to the largest value, on which one such token makes all others one colour."""
    tokens = torch.randn(10, 10, 8)
    tokens[..., 0] *= 10
    tokens[0, 0, 0] = 150
    assert pca_colors(tokens)[1:, :, 0].std() > 0.2


def test_tokens_that_agree_are_grey_and_one_that_differs_stands_out():
    """Pins 0 / 0, and rounding blown up to colours, on an empty page and on one with a single word."""
    tokens = torch.ones(8, 8, 8)
    assert torch.equal(pca_colors(tokens), torch.full((8, 8, 3), 0.5))
    assert torch.equal(pca_colors(tokens[:1, :1]), torch.full((1, 1, 3), 0.5))
    tokens[2, 3] = 2
    colors = pca_colors(tokens)
    assert colors[2, 3, 0] == 1
    assert colors[..., 0].sum() == 1
    assert torch.equal(colors[..., 1:], torch.full((8, 8, 2), 0.5))


def test_a_margin_decides_nothing_about_the_colours_of_the_page():
    """Pins a padded page whose first component is page against padding."""
    tokens = torch.randn(4, 4, 8)
    on_page = torch.ones(4, 4, dtype=torch.bool)
    on_page[:, 3] = False
    colors = pca_colors(tokens, on_page=on_page)
    tokens[:, 3] = 100
    assert torch.equal(pca_colors(tokens, on_page=on_page)[on_page], colors[on_page])


def test_what_ends_rows_and_page_in_a_sequence_is_left_out():
    """Pins the released sequence, whose rows are one token longer than the grid's."""
    tokens = torch.arange(2 * 3 * 5.0).view(6, 5)
    ends = torch.full((2, 1, 5), -1.0)
    sequence = torch.cat([torch.cat([tokens.view(2, 3, 5), ends], dim=1).flatten(0, 1), ends[0]])
    page = torch.zeros(3, 128, 192)
    assert torch.equal(on_grid(sequence, page, 64), on_grid(tokens, page, 64))
    with pytest.raises(ValueError, match="gives 8 tokens for a page of 2 x 3 squares"):
        on_grid(sequence[1:], page, 64)


def test_a_page_that_is_cut_into_tiles_is_shown_whole():
    """Pins the tokens of tiles, and the marks of the sequence, among those of the page."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="sequence"))
    image_processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=256, tile_size=128)
    view = view_page(model, Image.new("RGB", WIDE), image_processor=image_processor)
    expected = model(view.pixel_values[None]).last_hidden_state[0]
    assert view.grid == (4, 4)
    assert relative_error(view.tokens[1, 0], expected[5]) < TOLERANCE[torch.float32]
    assert view.pixel_gradient((1, 0)).values.shape == (256, 256)


# Similarity and attention


def test_similarity_is_1_at_the_token_and_the_cosine_elsewhere(view):
    """Pins row and column exchanged."""
    values = view.similarity((1, 3)).values
    assert values[1, 3] == pytest.approx(1, abs=1e-6)
    first, second = view.tokens[1, 3], view.tokens[2, 0]
    assert values[2, 0] == pytest.approx((first @ second / (first.norm() * second.norm())).item(), abs=1e-5)
    assert view.similarity((1, 3)).limits == (values.min(), 1.0)
    farthest = np.unravel_index(values.argmin(), values.shape)
    assert view.similarity(farthest).values[1, 3] == pytest.approx(values.min(), abs=1e-6)


@pytest.mark.parametrize("head", [None, 0, 3])
def test_attention_is_divided_among_the_tokens(view, head):
    """Pins a column of the weights in place of a row: what attends to the token, which does not sum to 1."""
    for layer in (0, -1):
        attention = view.attention((2, 1), layer=layer, head=head)
        assert attention.values.shape == (4, 4)
        assert attention.values.sum() == pytest.approx(1, abs=1e-5)
        weights = view.attentions[layer][:, 2 * 4 + 1]
        expected = weights.mean(0) if head is None else weights[head]
        assert np.allclose(attention.values.flatten(), expected)


def test_a_class_token_attends_and_takes_its_share(image_processor):
    """Pins a row too far: with a class token, the first, every other one's weights are one further."""
    model = DeepSeekOCRVisionModel(tiny_config(feature_mode="concat"))
    view = view_page(model, marked_page(WIDE, "top left"), image_processor=image_processor)
    weights = view.attentions[0].mean(0)
    for token, query in ((None, 0), ((0, 0), 1), ((3, 3), 16)):
        values = view.attention(token, layer=0).values
        assert np.allclose(values.flatten(), weights[query, 1:])
        assert values.sum() == pytest.approx(1 - weights[query, 0].item(), abs=1e-5)


# Gradients


def test_the_pixel_gradient_of_a_token_equals_finite_differences(tiny_model):
    """Pins the gradient of another token, of another number, or by a factor."""
    model, page, step = tiny_model.double(), pixels(1, dtype=torch.float64)[0], 1e-5
    gradient = pixel_gradient(model, page, (1, 0))
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(page.shape, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            ends = [model((page + sign * step * direction)[None]).last_hidden_state[0, 2].norm() for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_loss_of_ones_own_has_a_pixel_gradient(tiny_model):
    """Pins tokens handed over in another order than rows and columns, and any step on the way that detaches."""
    head, page = nn.Linear(32, 10), pixels(1)[0]
    gradient = pixel_gradient(tiny_model, page, lambda tokens: head(tokens[1, 0]).log_softmax(0)[3])
    leaf = page.clone().requires_grad_()
    head(tiny_model(leaf[None]).last_hidden_state[0, 2]).log_softmax(0)[3].backward()
    assert relative_error(gradient, leaf.grad) < TOLERANCE[torch.float32]
    assert head.weight.grad is not None


def test_the_model_stays_as_it_is(view):
    """Pins an image drawn between two steps of training that adds to gradients or ends in evaluation mode."""
    model = view.model
    model.train()
    model.sam_model.eval()
    model.freeze("clip.layers.0")
    expected = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    page_view = view_page(model, view.page, image_processor=DeepSeekOCRVisionImageProcessor(size=128))
    page_view.pixel_gradient((0, 0), num_samples=2)
    with pytest.raises(RuntimeError, match="mine"):
        page_view.pixel_gradient(fails)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == expected
    assert [module.training for module in model.modules()] == modes


def fails(tokens):
    """A caller's function with a fault."""
    raise RuntimeError("mine")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_frozen_weights_and_no_grad_change_nothing(tiny_model, use_reentrant):
    """Pins reentrant checkpointing, which refuses to differentiate by pixels, and a caller under `no_grad`."""
    page = pixels(1)[0]
    expected = pixel_gradient(tiny_model, page, (0, 1))
    tiny_model.train().freeze()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            gradient = pixel_gradient(tiny_model, page, (0, 1))
        assert relative_error(gradient, expected) < TOLERANCE[torch.float32]


def test_bfloat16_gives_the_same_images_to_its_precision(view, image_processor):
    """Pins numpy, which knows no bfloat16, and a norm's gradient rounded twice."""
    half = view_page(view.model.to(torch.bfloat16), view.page, image_processor=image_processor)
    assert half.tokens.dtype == torch.float32
    assert relative_error(half.tokens, view.tokens) < TOLERANCE[torch.bfloat16]
    assert half.attention((0, 0)).values.dtype == np.float32
    gradient = half.pixel_gradient((1, 2))
    assert gradient.values.dtype == np.float32
    assert gradient.values.max() > 0
    assert gradient.draw().size == view.page.size


def test_smoothing_is_a_mean_over_noisy_copies_that_a_seed_gives_again(tiny_model):
    """Pins SmoothGrad: no noise is the plain gradient, and the mean is of gradients, not a sum."""
    page = pixels(1)[0]
    plain = pixel_gradient(tiny_model, page, (0, 0))
    assert relative_error(pixel_gradient(tiny_model, page, (0, 0), num_samples=3, noise=0.0), plain) < 1e-5
    smooth = [pixel_gradient(tiny_model, page, (0, 0), num_samples=2, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(smooth[0], smooth[1])
    assert relative_error(smooth[0], smooth[2]) > 0.01


# The place on the page


@pytest.mark.parametrize("size", [WIDE, HIGH])
@pytest.mark.parametrize("corner", ["top left", "bottom right"])
@pytest.mark.parametrize("do_pad", [False, True])
def test_what_is_in_a_corner_of_the_page_is_drawn_in_that_corner(tiny_model, size, corner, do_pad):
    """Pins axes exchanged, and a margin that is drawn on the page, for stretched and for padded pages.

    All but the mark is 0 to the encoder, so gradient times input is the mark.
    """
    image_processor = DeepSeekOCRVisionImageProcessor("deepseek-ocr", size=256, do_pad=do_pad, image_mean=127 / 255)
    page = marked_page(size, corner)
    view = view_page(tiny_model, page, image_processor=image_processor)
    gradient = view.pixel_gradient(lambda tokens: tokens.square().sum(), times_input=True)
    image = np.asarray(gradient.draw(alpha=1.0), dtype=np.float32).sum(-1)
    assert image.shape == size[::-1]
    bright, mark = image > image.max() / 2, mark_of(page)
    assert bright.sum() > 20
    assert bright[mark].sum() > 0.8 * bright.sum()


@pytest.mark.parametrize("do_pad", [False, True])
def test_token_and_pixel_lead_to_each_other(tiny_model, do_pad):
    """Pins the way back: from a pixel of the page to the token whose square it lies in, and to that square."""
    image_processor = DeepSeekOCRVisionImageProcessor(size=256, do_pad=do_pad)
    view = view_page(tiny_model, Image.new("RGB", WIDE), image_processor=image_processor)
    for x in (0, 33, 151, 299):
        for y in (0, 59, 60, 119):
            left, top, right, bottom = view.box(view.token_at(x, y))
            assert left <= x < right
            assert top <= y < bottom
    assert view.token_at(299, 119) == ((2, 3) if do_pad else (3, 3))
    assert view.on_page.sum() == (8 if do_pad else 16)


@pytest.mark.parametrize("do_pad", [False, True])
def test_the_richest_token_has_the_mark_and_not_the_edge_of_the_page(tiny_model, do_pad):
    """Pins the step from the paper to the margin, larger than that from the paper to a pale mark."""
    page = Image.new("RGB", WIDE, "white")
    ImageDraw.Draw(page).rectangle((200, 70, 219, 89), fill=(200, 200, 200))
    image_processor = DeepSeekOCRVisionImageProcessor(size=256, do_pad=do_pad)
    view = view_page(tiny_model, page, image_processor=image_processor)
    assert view.richest_token() == view.token_at(210, 80)


def test_a_tokens_square_is_drawn_where_its_box_is(tiny_model):
    """Pins colours shifted by a margin that is no whole number of tokens."""
    image_processor = DeepSeekOCRVisionImageProcessor(size=256, do_pad=True)
    view = view_page(tiny_model, Image.new("RGB", WIDE), image_processor=image_processor)
    assert view.place[1] % 64
    for token in ((1, 0), (2, 3)):
        similarity = view.similarity((0, 0))
        similarity.values[:] = 0
        similarity.values[token] = 1
        image = np.asarray(similarity.draw(alpha=1.0, limits=(0, 1)))
        left, top, right, bottom = map(round, view.box(token))
        is_yellow = image[..., 0] > 200
        assert is_yellow[top:bottom, left:right].all()
        assert is_yellow.sum() == (bottom - top) * (right - left)


def test_every_kind_of_image_gives_one_view(tmp_path, tiny_model, image_processor):
    """Pins a path, an opened file, an array and a tensor; and the tokens that `encode` gives."""
    page = marked_page(HIGH, "top right")
    page.save(tmp_path / "page.png")
    (tokens,) = tiny_model.encode(page, image_processor=image_processor)
    tensor = torch.from_numpy(np.array(page)).permute(2, 0, 1)
    for image in (page, str(tmp_path / "page.png"), tmp_path / "page.png", np.asarray(page)):
        view = view_page(tiny_model, image, image_processor=image_processor)
        assert view.page.size == HIGH
        assert relative_error(view.tokens.flatten(0, 1), tokens) < TOLERANCE[torch.float32]
    assert view_page(tiny_model, tensor, image_processor=image_processor).page.tobytes() == page.tobytes()


def test_alpha_goes_from_the_page_to_the_colours(view):
    """Pins colours and page exchanged."""
    colors = view.pca()
    page = np.asarray(view.page.convert("L").convert("RGB"))
    assert np.array_equal(np.asarray(colors.draw(alpha=0.0)), page)
    assert len(np.unique(np.asarray(colors.draw(alpha=1.0)).reshape(-1, 3), axis=0)) <= 16


# What does not work


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda view: view.similarity((4, 0)), ValueError, r"rows go from 0 to 3"),
        (lambda view: view.similarity((0, -1)), ValueError, r"`token` is \(0, -1\)"),
        (lambda view: view.similarity(5), TypeError, r"`token` is 5; it has to be \(row, column\)"),
        (lambda view: view.attention(), ValueError, "no class token"),
        (lambda view: view.attention((0, 0), layer=2), ValueError, "`layer` is 2; CLIP layers go from 0 to 1"),
        (lambda view: view.attention((0, 0), head=4), ValueError, "`head` is 4; heads go from 0 to 3"),
        (lambda view: view.pixel_gradient((0, 9)), ValueError, "columns from 0 to 3"),
        (lambda view: view.pixel_gradient((0, 0), num_samples=-1), ValueError, "`num_samples` is -1"),
        (lambda view: view.pixel_gradient(lambda tokens: tokens[0, 0]), ValueError, r"a tensor of \[32\]"),
        (lambda view: view.pixel_gradient(lambda tokens: 1.0), TypeError, "returned a float"),
        (lambda view: view.pixel_gradient(lambda tokens: tokens.detach().sum()), ValueError, "does not depend"),
        (lambda view: view.pca().draw(alpha=2), ValueError, "`alpha` is 2"),
        (lambda view: view.pca().save("image.txt"), ValueError, "no image format"),
        (lambda view: view.token_at(300, 0), ValueError, "300 pixels wide"),
        (lambda view: view_page(nn.Linear(2, 2), view.page), TypeError, "got a Linear"),
        (lambda view: view_page(view.model, [view.page]), TypeError, "image is of type list"),
    ],
)
def test_a_mistake_is_told(view, ask, error, message):
    """Pins what a caller gets wrong: a message with the value and what is allowed, not an index error."""
    with pytest.raises(error, match=message):
        ask(view)


def test_without_matplotlib_the_colours_of_pca_are_there_and_others_say_what_to_install(view, monkeypatch):
    """Pins an installation without the extra `train`."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert view.pca().draw().size == view.page.size
    for ask in (view.similarity((0, 0)).draw, lambda: draw_sheet(view)):
        with pytest.raises(ImportError, match=re.escape("pip install 'deepseek-ocr-vision[train]'")):
            ask()


def test_weights_that_are_no_numbers_are_told(tiny_model):
    """Pins an empty image after a training that diverged."""
    tiny_model.sam_model.pos_embed.data[:] = float("nan")
    with pytest.raises(ValueError, match="tokens hold NaN"):
        view_page(tiny_model, marked_page(WIDE, "top left"))


# The sheet


def test_show_writes_one_sheet_a_page(tmp_path, checkpoint, capsys):
    """Pins the command from end to end: files, folders, what is replaced, and that nothing else is left."""
    pages = [tmp_path / "first.png", tmp_path / "second.jpg"]
    for page, size in zip(pages, (WIDE, HIGH), strict=True):
        marked_page(size, "bottom right", paper=(255, 255, 255)).save(page)
    single, folder = tmp_path / "sheet.png", tmp_path / "sheets"
    single.write_text("an older one")
    arguments = ["--model", str(checkpoint), "--token", "1,2", "--layer", "0"]
    assert main(["show", str(pages[0]), *arguments, "--out", str(single)]) == 0
    assert str(single) in capsys.readouterr().out
    assert main(["show", *map(str, pages), *arguments, "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["first-sheet.png", "second-sheet.png"]
    with Image.open(single) as sheet, Image.open(folder / "first-sheet.png") as same:
        assert sheet.width > 1000
        assert sheet.tobytes() == same.tobytes()
    assert len(list(tmp_path.iterdir())) == 5


def test_show_takes_a_page_of_a_file_with_several(tmp_path, checkpoint, capsys):
    """Pins `--page`, and what is said where there is no such page."""
    first, second = marked_page(WIDE, "top left"), marked_page(HIGH, "bottom right")
    first.save(tmp_path / "fax.tif", save_all=True, append_images=[second])
    arguments = ["show", str(tmp_path / "fax.tif"), "--model", str(checkpoint), "--out", f"{tmp_path / 'sheets'}/"]
    assert main([*arguments, "--page", "2"]) == 0
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["fax-2-sheet.png"]
    assert main([*arguments, "--page", "3"]) == 1
    assert "fax.tif: there is no page 3; pages go from 1 to 2" in capsys.readouterr().err


def test_show_takes_files_of_any_name(tmp_path, checkpoint):
    """Pins a name that is not UTF-8, which ended the command in the middle, and dollars, taken for a formula."""
    pages = [os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/caf\xe9.png", b"/$^$.png")]
    for page in pages:
        marked_page(WIDE, "top left").save(page)
    assert main(["show", *pages, "--model", str(checkpoint), "--out", f"{tmp_path / 'sheets'}/"]) == 0
    assert sorted(os.listdir(os.fsencode(tmp_path / "sheets"))) == [b"$^$-sheet.png", b"caf\xe9-sheet.png"]


def test_show_says_what_is_wrong_before_it_writes(tmp_path, checkpoint, capsys, monkeypatch):
    """Pins exit code 1 with a message, and no sheet of the first page when the second is not there."""
    monkeypatch.chdir(tmp_path)
    marked_page(WIDE, "top left").save("page.png")
    (tmp_path / "other").mkdir()
    marked_page(WIDE, "top left").save("other/page.png")
    model = ["--model", str(checkpoint)]
    for arguments, expected in (
        (["page.png", "missing.png", *model], "missing.png"),
        (["page.png", *model, "--token", "9,0"], "rows go from 0 to 3"),
        (["page.png", *model, "--layer", "7"], "`layer` is 7"),
        (["page.png", *model, "--out", "sheet.txt"], "no image format"),
        (["page.png", "other/page.png", *model], "page-sheet.png twice"),
        (["page.png", "page.png", *model, "--out", "page.png"], "page.png is a file; 2 pages need a folder"),
        (["page.png", "--model", "other"], "other"),
    ):
        assert main(["show", *arguments]) == 1
        assert expected in capsys.readouterr().err
    for arguments, expected in (
        (["page.png"], "--model"),
        (["page.png", *model, "--token", "3"], "'3' is not ROW,COL"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["show", *arguments])
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"page.png", "other", "model"}


def test_a_disk_that_is_full_is_an_error_that_names_the_sheet(tmp_path):
    """Pins "No space left on device" without a word about where, and half an image under the sheet's name."""
    resource = pytest.importorskip("resource", reason="this system has no limits of that kind")
    (tmp_path / "sheet.png").write_text("an older one")
    (tmp_path / f"{PREFIX}killed").mkdir()  # by a process that was killed while it wrote
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"sheet\.png could not be written: .*File too large"):
            save_image(Image.effect_noise((64, 64), 100), tmp_path / "sheet.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("sheet.png", "an older one")]


def test_numbers_that_are_all_equal_are_drawn_as_the_lowest(view):
    """Pins 0 / 0, which is drawn in no colour at all: a number that no pixel changes."""
    gradient = view.pixel_gradient(lambda tokens: (tokens * 0).sum())
    image = np.asarray(gradient.draw(alpha=1.0)).reshape(-1, 3)
    assert np.array_equal(np.unique(image, axis=0), [matplotlib.colormaps["magma"](0.0, bytes=True)[:3]])


def test_the_sheet_of_an_empty_and_very_high_page_is_drawn(tiny_model):
    """Pins scales without extent, and a figure a hundred times as high as wide."""
    view = view_page(tiny_model, Image.new("RGB", (50, 2000)))
    sheet = draw_sheet(view)
    assert 1000 < sheet.width < 2000
    assert sheet.height < 2000


def test_the_example_trains_and_draws(tmp_path):
    """Pins the script behind the images of docs/seeing.md, on small pages, with a page of a PDF."""
    pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed")
    Image.new("RGB", (300, 300), "white").save(tmp_path / "page.pdf")
    command = [sys.executable, str(ROOT / "examples" / "seeing.py"), "--max_steps", "1", "--page_size", "256"]
    command += ["--pdf", str(tmp_path / "page.pdf"), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    drawn = {"encoder", "pages.png", "page.png", "sheet.png", "letters.png"}
    assert drawn <= {path.name for path in tmp_path.iterdir()}
    view = view_page(DeepSeekOCRVisionModel.from_pretrained(tmp_path / "encoder"), tmp_path / "page.png")
    assert view.grid == (4, 4)


def test_the_example_knows_what_stands_on_each_square(monkeypatch):
    """Pins labels a square aside: the ink is looked for on the page."""
    pytest.importorskip("rapidfuzz", reason="the extra `train` is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    seeing = importlib.import_module("seeing")
    lines = [seeing.Line(0, 4, "Some-"), seeing.Line(1, 5, "thing"), seeing.Line(7, 14, "offpage")]
    page = seeing.draw_page(lines, 256)
    expected = {1: "some\nthi", 2: "-\nng", 15: "of"}
    assert page["texts"] == [expected.get(index, "") for index in range(16)]
    ink = np.asarray(page["image"].convert("L")).reshape(4, 64, 4, 64).min(axis=(1, 3)) < 128
    assert np.flatnonzero(ink).tolist() == list(expected)
