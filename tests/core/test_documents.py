"""Pages of PDF files become images; other files are one clear error."""

from __future__ import annotations

import sys

import pytest

from codefend.core import documents, images
from codefend.core.documents import render_pages
from codefend.types import CodefendError
from pdf_kit import LOCK, SCRIPT, pdf


def test_each_page_becomes_an_image_of_the_given_size() -> None:
    pages = [images.load(file).pixels for file in render_pages(pdf(0.25, 0.75), side=64)]
    assert [page.shape for page in pages] == [(3, 32, 64)] * 2
    assert [round(float(page.mean()), 2) for page in pages] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG", "not a PDF file"),
        (b"", "not a PDF file"),
        (b"%PDF-1.7 and nothing more", "damaged"),
        (pdf(0.5)[:60], "damaged"),
        (pdf(), "damaged"),
        (pdf(*[0.5] * 4), "has 4 pages; the limit is 3"),
        (pdf(0.5, size=(10, 5000)), "page 1 of the PDF measures 10 x 5000"),
        (pdf(0.5, trailer=LOCK), "encrypted"),
        (pdf(0.5, catalog=SCRIPT), "scripts"),
    ],
)
def test_bad_documents_are_one_clear_error(data: bytes, message: str) -> None:
    with pytest.raises(CodefendError, match=message):
        render_pages(data, max_pages=3, side=64)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(CodefendError, match=r"codefend\[documents\]"):
        documents.require()
