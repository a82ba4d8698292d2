"""Small PDF files whose pages are of one shade of grey."""

from __future__ import annotations

LOCK = b"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O (%s) /U (%s) >> /ID [<00> <00>]" % (b"o" * 32, b"u" * 32)
SCRIPT = b"/OpenAction << /S /JavaScript /JS (app.alert\\(1\\)) >>"


def pdf(*shades: float, size: tuple[int, int] = (200, 100), catalog: bytes = b"", trailer: bytes = b"") -> bytes:
    """A page of ``size`` (width, height; points) for each shade in [0, 1], and more entries of catalog and trailer."""
    kids = b" ".join(b"%d 0 R" % (3 + 2 * i) for i in range(len(shades)))
    objects = [b"<< /Type /Catalog /Pages 2 0 R %s >>" % catalog]
    objects += [b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(shades))]
    for i, shade in enumerate(shades):
        drawing = b"%g g 0 0 %d %d re f" % (shade, *size)
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %d %d] /Contents %d 0 R >>" % (*size, 4 + 2 * i)
        objects += [page, b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawing), drawing)]
    file, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(file))
        file += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(file))
    return file + head + table + end
