"""Pages of PDF files as images, by PDFium (package ``pypdfium2``).

Only pixels come out: no script runs, and text layers, attachments and form fields stay behind.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import torch

from codefend.core import images
from codefend.core.assets import needs
from codefend.types import CodefendError

SIDE = 1280  # pixels; longer side of a page
MAX_PAGES = 20
MAX_RATIO = 100.0  # longer side over shorter side
_PDFIUM = threading.Lock()  # the library is not thread-safe
_SCRIPT = re.compile(rb"/(?:JavaScript|JS)\b")
_PASSWORD = 4  # PDFium's error code


def is_pdf(data: bytes) -> bool:
    """Whether a file begins as PDF files do."""
    return data.startswith(b"%PDF-")


def require() -> Any:
    """The package. Raises CodefendError when it is not installed."""
    with needs("reading documents", "documents"):
        import pypdfium2
    return pypdfium2


def render_pages(
    data: bytes, *, max_pages: int = MAX_PAGES, side: int = SIDE, max_ratio: float = MAX_RATIO
) -> list[bytes]:
    """Each page of a PDF as a PNG file whose longer side has ``side`` pixels.

    Raises CodefendError for what is no PDF, damaged, encrypted, without pages or with scripts, for more than
    ``max_pages`` pages, and for a page longer than ``max_ratio`` times its width.
    """
    pdfium = require()
    if not is_pdf(data):
        raise CodefendError("the document is not a PDF file")
    with _PDFIUM:
        try:
            return list(_render(pdfium, data, max_pages, side, max_ratio))
        except pdfium.PdfiumError as error:
            if getattr(error, "err_code", None) == _PASSWORD:
                raise CodefendError("the PDF is encrypted; send it without a password") from error
            raise CodefendError("the PDF is damaged or cut short") from error


def _render(pdfium: Any, data: bytes, max_pages: int, side: int, max_ratio: float) -> Iterator[bytes]:
    document = pdfium.PdfDocument(data)
    try:
        if _SCRIPT.search(data) or pdfium.raw.FPDFDoc_GetJavaScriptActionCount(document) > 0:
            raise CodefendError("the PDF holds scripts; print it to a PDF without them")
        if not 0 < len(document) <= max_pages:
            raise CodefendError(f"the PDF has {len(document):,} pages; the limit is {max_pages}")
        for number in range(len(document)):
            width, height = document.get_page_size(number)
            if not 0 < max(width, height) <= max_ratio * min(width, height):
                raise CodefendError(f"page {number + 1} of the PDF measures {width:g} x {height:g}")
            page = document[number]
            bitmap = page.render(scale=side / max(width, height), may_draw_forms=False, rev_byteorder=True)
            pixels = torch.from_numpy(bitmap.to_numpy()[..., :3].copy()).permute(2, 0, 1)
            bitmap.close()
            page.close()
            yield images.encode(pixels / 255)
    finally:
        document.close()
