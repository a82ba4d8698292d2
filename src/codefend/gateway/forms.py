"""Multipart forms, read only in the one plain way that all parsers agree about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from codefend.gateway.errors import Refused
from codefend.gateway.suspicion import check_texts, is_audio_file, search

_TYPE = re.compile(r"multipart/form-data;\s*boundary=\"?([\w'()+,./:=? -]{1,70})\"?\s*\Z", re.IGNORECASE | re.ASCII)
_DISPOSITION = re.compile(rb"form-data;\s*name=\"([\w\[\]-]{1,64})\"(;\s*filename=\"[^\"\\\r\n]{0,255}\")?\s*\Z")
_MAX_FIELD = 1 << 16  # bytes


@dataclass(frozen=True)
class Part:
    """One field of a form; ``head`` are its header lines as they were."""

    head: bytes
    name: str
    is_file: bool
    content: bytes


@dataclass(frozen=True)
class Form:
    boundary: bytes
    parts: tuple[Part, ...]

    def write(self) -> bytes:
        """The form as bytes, for the content type that it was read with."""
        parts = [b"--" + self.boundary + b"\r\n" + part.head + b"\r\n\r\n" + part.content for part in self.parts]
        return b"\r\n".join([*parts, b"--" + self.boundary + b"--\r\n"])

    def field(self, name: str) -> str:
        """The text of a field, empty where there is none. Raises Refused (400) for one that is given twice."""
        values = [part.content for part in self.parts if part.name == name and not part.is_file]
        if len(values) > 1:
            raise _malformed()
        return values[0].decode("utf-8", "replace") if values else ""


def read_form(content_type: str, raw: bytes) -> Form:
    """Split a form. Raises Refused (400, 415) for all that two parsers could read in two ways."""
    match = _TYPE.match(content_type)
    if match is None:
        raise Refused(415, "unknown_content", "expected multipart/form-data")
    boundary = match[1].encode()
    start, end = b"--" + boundary + b"\r\n", b"\r\n--" + boundary + b"--"
    if not raw.startswith(start) or not raw.rstrip(b"\r\n").endswith(end):
        raise _malformed()
    body = raw[len(start) : raw.rindex(end)]
    return Form(boundary, tuple(_part(part, boundary) for part in body.split(b"\r\n--" + boundary + b"\r\n")))


def _part(raw: bytes, boundary: bytes) -> Part:
    head, blank, content = raw.partition(b"\r\n\r\n")
    if not blank or b"--" + boundary in raw:
        raise _malformed()
    dispositions = []
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-disposition":
            dispositions.append(_DISPOSITION.match(value.strip()))
        elif name.lower() != b"content-type":
            raise _malformed()
    if len(dispositions) != 1 or dispositions[0] is None:
        raise _malformed()
    return Part(head, dispositions[0][1].decode(), dispositions[0][2] is not None, content)


def check_audio_form(content_type: str, raw: bytes) -> None:
    """Raise Refused unless all files are audio and all other fields are short texts without images."""
    for part in read_form(content_type, raw).parts:
        if part.is_file:
            if not is_audio_file(part.content):
                message = "the file is not WAV, MP3, Ogg, FLAC, MP4 or WebM audio"
                raise Refused(400, "unknown_content", message, where=part.name)
        else:
            check_field(part)


def check_field(part: Part) -> None:
    """Raise Refused for a text that is long, not UTF-8, or holds an image."""
    if len(part.content) > _MAX_FIELD:
        raise Refused(413, "body_too_complex", f"a form field has more than {_MAX_FIELD:,} bytes")
    try:
        text = part.content.decode()
    except UnicodeDecodeError as error:
        raise _malformed() from error
    check_texts(text, image_links=False)
    search(text, ())


def replace_contents(form: Form, contents: Sequence[bytes]) -> Form:
    """The form with other contents, part by part."""
    parts = zip(form.parts, contents, strict=True)
    return Form(form.boundary, tuple(Part(part.head, part.name, part.is_file, content) for part, content in parts))


def _malformed() -> Refused:
    return Refused(400, "unknown_content", "the form is not written in the plain way that can be inspected")
