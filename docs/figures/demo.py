"""Draw the image of docs/demo.md: the demo in a browser, with one of its examples and a token of it.

python examples/seeing.py
python docs/figures/demo.py outputs/seeing/encoder     # writes docs/demo.png
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from deepseek_ocr_vision import app
from deepseek_ocr_vision.visualize.pages import save_image


ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, PLACE = 1, (0.2, 0.33)  # the receipt, and where on it is clicked, as parts of its width and height
PATIENCE = 300_000  # milliseconds


def click_on_the_page(page: Page) -> None:
    """Click at PLACE on the page, which is fitted into the middle of its box, and wait for what follows."""
    caption = page.inner_text("#caption")
    shown = page.locator("#page img").first
    box, size = shown.bounding_box(), shown.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    scale = min(box["width"] / size[0], box["height"] / size[1])
    left, top = (box["width"] - scale * size[0]) / 2, (box["height"] - scale * size[1]) / 2
    page.mouse.click(box["x"] + left + PLACE[0] * scale * size[0], box["y"] + top + PLACE[1] * scale * size[1])
    changed = "before => document.querySelector('#caption').innerText !== before"
    page.wait_for_function(changed, arg=caption)
    page.mouse.move(0, 0)
    page.wait_for_timeout(3000)  # until images and marks of progress are in their last state


def draw(model: str, path: Path) -> None:
    """Open the demo of an encoder, take an example, click on it, and write what the browser shows."""
    _, url, _ = (demo := app.build_demo(app.Encoder(model))).launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1300, "height": 1022})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.locator("#examples button").nth(EXAMPLE).click()
        page.locator("#sheet img").wait_for()
        click_on_the_page(page)
        page.screenshot(path=path)
        chromium.close()
    demo.close(verbose=False)
    with Image.open(path) as screenshot:
        drawn = screenshot.convert("RGB").quantize(dither=Image.Dither.NONE)
    save_image(drawn, path)


if __name__ == "__main__":
    draw(sys.argv[1], ROOT / "docs" / "demo.png")
