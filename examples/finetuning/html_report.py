"""report.html: the results and many pages, in one file that opens in any browser."""

import base64
import html
from io import BytesIO
from pathlib import Path
from typing import Any

from files import write_text
from PIL import Image
from report import character_error_rate
from torch.utils.data import Dataset

from finetuning.scores import Circumstances, RunResult, explanation, how_equal, measured_by, score_rows
from finetuning.text_layout import Piece, compared


NUM_FIRST_PAGES, NUM_WORST_PAGES = 20, 10
LARGEST_IMAGE = 1100  # pixels
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
tr { border-bottom: 1px solid #d1d9e0; } tr:nth-child(2) td { font-weight: 600; font-size: 1.15em; }
.page { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1.5rem; padding: 1.2rem 0;
  border-top: 1px solid #d1d9e0; }
img { max-width: 100%; border: 1px solid #d1d9e0; } .curve { border: 0; max-width: 45rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 1rem; unicode-bidi: plaintext; }
h3 { font-size: .85rem; font-weight: 600; color: #59636e; margin: 0; } pre { white-space: pre-wrap; }
ins, del { text-decoration: none; border-radius: .2em; padding: 0 .05em; }
ins { background: #ffdcd7; color: #a40e26; } del { background: #fff3c4; color: #7d4e00; }
.right { color: #1a7f37; }
@media (max-width: 45rem) { .page { grid-template-columns: minmax(0, 1fr); } }
"""


def write_html(
    results: list[RunResult], pages: Dataset, how: Circumstances, check: dict[str, Any] | None, folder: Path
) -> None:
    """Write `report.html` into a folder that has `loss.png`."""
    result = results[0]
    rates = [character_error_rate([read], [text]) for read, text in zip(result.read, result.written, strict=True)]
    first = range(min(NUM_FIRST_PAGES, len(rates)))
    ranked = sorted(range(len(rates)), key=lambda index: -rates[index])
    worst = [index for index in ranked[:NUM_WORST_PAGES] if rates[index] > 0 and index not in first]
    curve = base64.b64encode((folder / "loss.png").read_bytes()).decode()
    sections = [
        f"<h1>A DeepSeek-OCR vision encoder, trained to read</h1>{table(score_rows(results))}",
        f"<p>{prose(explanation(results))}</p>",
        f'<img class="curve" alt="losses over the steps" src="data:image/png;base64,{curve}">',
        "<h2>The pages</h2><ul>" + "".join(f"<li>{prose(line)}</li>" for line in how.pages) + "</ul>",
        f"<p>Data: {prose(how.data)}</p>",
        "<p>In what is written, <del>what was not read</del> is marked; in what was read, <ins>what is not "
        "written</ins>. A ↵ stands for a line break that differs.</p>",
        *page_section(f"The first {len(first)} held-out pages", first, pages, result, rates),
        *page_section("The worst of the other held-out pages", worst, pages, result, rates),
        f"<h2>The saved encoder</h2><p>{prose(how_equal(check))}</p>",
        f"<h2>How it was measured</h2><pre>{html.escape(how.command)}</pre><p>{prose(measured_by(how))}</p>",
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(sections)
    write_text(
        folder / "report.html", f"{head}<title>Trained to read</title><style>{STYLE}</style>\n{body}\n</html>\n"
    )


def prose(text: str) -> str:
    """A sentence as HTML, what stands in backticks as code."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def table(rows: list[tuple[str, ...]]) -> str:
    """A heading and rows."""
    lines = []
    for index, row in enumerate(rows):
        tag = "td" if index else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def page_section(title: str, indexes: Any, pages: Dataset, result: RunResult, rates: list[float]) -> list[str]:
    """A heading and some pages, if there are any."""
    shown = [page(pages[i]["image"], result.written[i], result.read[i], i, rates[i]) for i in indexes]
    return [f"<h2>{title}</h2>", *shown] if shown else []


def page(image: Image.Image, written: str, read: str, index: int, rate: float) -> str:
    """A page beside what is written on it and what was read."""
    left, right = compared(written, read)
    texts = (
        f"<h3>written</h3>{marked(left, 'del')}<h3>read; character error rate {rate:.1%}</h3>{marked(right, 'ins')}"
    )
    if written == read:
        texts = f'<h3 class="right">written, and read without a mistake</h3>{marked(left, "del")}'
    return f'<div class="page"><img alt="held-out page {index}" src="{as_data(image)}"><div>{texts}</div></div>'


def marked(pieces: list[Piece], tag: str) -> str:
    """Text in full, in its own direction, with what differs in a tag."""
    parts = []
    for piece in pieces:
        text = html.escape(piece.text, quote=False)
        parts.append(f"<{tag}>{text.replace(chr(10), '↵' + chr(10))}</{tag}>" if piece.differs else text)
    return f'<p class="text" dir="auto">{"".join(parts) or "(nothing)"}</p>'


def as_data(image: Image.Image) -> str:
    """An image inside the file."""
    smaller = image.copy()
    smaller.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE), Image.Resampling.LANCZOS)
    content = BytesIO()
    smaller.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
