"""Forms of transcription routes: audio and short texts, in one spelling."""

from __future__ import annotations

import pytest

from codefend.gateway.errors import Refused
from codefend.gateway.forms import check_audio_form
from gateway_kit import Upstream, gateway, png, run

WAV = b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)
TYPE = "multipart/form-data; boundary=xyz"


def form(
    content: bytes = WAV, field: bytes = b"whisper-1", disposition: bytes = b'name="file"; filename="a.wav"'
) -> bytes:
    return (
        b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + field + b"\r\n--xyz\r\n"
        b"Content-Disposition: form-data; "
        + disposition
        + b"\r\nContent-Type: audio/wav\r\n\r\n"
        + content
        + b"\r\n--xyz--\r\n"
    )


def test_audio_passes_where_the_route_is_served() -> None:
    async def work() -> None:
        upstream = Upstream()
        async with gateway(upstream, routes="transcription") as client:
            for content, status in ((WAV, 200), (png(1), 400)):
                files = {"file": ("a.wav", content, "audio/wav")}
                answer = await client.post("/v1/audio/transcriptions", files=files, data={"model": "m"})
                assert answer.status_code == status, answer.text
        assert len(upstream.requests) == 1

    run(work())


@pytest.mark.parametrize(
    ("content_type", "raw"),
    [
        (TYPE, form(png(1))),
        (TYPE, form(disposition=b'name="file"; filename="a.wav"; filename*=x')),
        (TYPE, form(disposition=b"name=file; filename=a.wav")),
        (TYPE, form(field=b"data:image/png;base64,AAAA")),
        (TYPE, form(field=b"x" * 70_000)),
        (TYPE, form(field=b"\xff")),
        (TYPE, form(WAV + b"\r\n--xyz \r\n")),
        (TYPE, b"preamble\r\n" + form()),
        (TYPE, form() + b"more"),
        (TYPE, b""),
        ("multipart/mixed; boundary=xyz", form()),
        ("multipart/form-data; boundary=xyz; boundary=abc", form()),
        ("application/octet-stream", WAV),
    ],
)
def test_what_parsers_disagree_about_is_refused(content_type: str, raw: bytes) -> None:
    check_audio_form(TYPE, form())
    with pytest.raises(Refused):
        check_audio_form(content_type, raw)
