"""Multipart forms of the transcription routes: files must be audio, and other fields short texts without images."""

from __future__ import annotations

import re

from codefend.gateway.errors import Refused
from codefend.gateway.suspicion import check_texts, is_audio_file, search

_TYPE = re.compile(r"multipart/form-data;\s*boundary=\"?([\w'()+,./:=? -]{1,70})\"?\s*\Z", re.IGNORECASE | re.ASCII)
_DISPOSITION = re.compile(rb"form-data;\s*name=\"[\w\[\]-]{1,64}\"(;\s*filename=\"[^\"\\\r\n]{0,255}\")?\s*\Z")
_MAX_FIELD = 1 << 16  # bytes


def check_audio_form(content_type: str, raw: bytes) -> None:
    """Raise Refused (400, 415) unless the form is written in the one plain way that all parsers agree about."""
    match = _TYPE.match(content_type)
    if match is None:
        raise Refused(415, "unknown_content", "expected multipart/form-data with an audio file")
    boundary = b"--" + match[1].encode()
    if (
        not raw.startswith(boundary + b"\r\n")
        or raw.rstrip(b"\r\n")[-len(boundary) - 4 :] != b"\r\n" + boundary + b"--"
    ):
        raise _malformed()
    body = raw[len(boundary) + 2 : raw.rindex(b"\r\n" + boundary + b"--")]
    for part in body.split(b"\r\n" + boundary + b"\r\n"):
        if boundary in part:
            raise _malformed()
        head, blank, content = part.partition(b"\r\n\r\n")
        if not blank:
            raise _malformed()
        _check_part(_is_file(head), content)


def _is_file(head: bytes) -> bool:
    file = False
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-disposition":
            match = _DISPOSITION.match(value.strip())
            if match is None:
                raise _malformed()
            file = match[1] is not None
        elif name.lower() != b"content-type":
            raise _malformed()
    return file


def _check_part(file: bool, content: bytes) -> None:
    if file:
        if not is_audio_file(content):
            raise Refused(
                400, "unknown_content", "the file is not WAV, MP3, Ogg, FLAC, MP4 or WebM audio", where="file"
            )
        return
    if len(content) > _MAX_FIELD:
        raise Refused(413, "body_too_complex", f"a form field has more than {_MAX_FIELD:,} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _malformed() from error
    check_texts(text, image_links=False)
    search(text, ())


def _malformed() -> Refused:
    return Refused(400, "unknown_content", "the form is not written in the plain way that can be inspected")
