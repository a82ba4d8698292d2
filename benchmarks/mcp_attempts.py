"""Ways past the MCP proxy for a server that knows it: an image in other block types, fields and encodings.

    python benchmarks/mcp_attempts.py

For each carrier: whether the proxy finds the image and replaces it, refuses the message, or lets it pass.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from typing import Any

import torch

from codefend.core import images
from codefend.gateway.errors import Refused
from codefend.gateway.options import Limits
from codefend.gateway.rewrite import EncodedImage
from codefend.integrations.mcp import messages

NEW = EncodedImage("image/png", base64.b64encode(b"purified").decode())


def carriers(data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a tool's result holds, by what an attacker does to hide the image."""
    code = base64.b64encode(data).decode()
    half, url = len(code) // 2, f"data:image/png;base64,{code}"

    def text(value: str) -> dict[str, Any]:
        return {"content": [{"type": "text", "text": value}]}

    yield "image block", {"content": [{"type": "image", "data": code, "mimeType": "image/png"}]}
    yield "audio block", {"content": [{"type": "audio", "data": code, "mimeType": "audio/wav"}]}
    yield "block of an unknown type", {"content": [{"type": "video", "data": code}]}
    yield "blob declared as a ZIP", {"content": [{"type": "resource", "resource": {"uri": "a://b", "blob": code}}]}
    yield "_meta", {"content": [], "_meta": {"example.org/preview": code}}
    yield "annotations of a block", {"content": [{"type": "text", "text": "", "annotations": {"x": url}}]}
    yield "structuredContent, nested", {"content": [], "structuredContent": {"a": [[{"b": code}]]}}
    yield "JSON in a text, twice", text(json.dumps({"a": json.dumps({"b": code})}))
    yield "HTML in a text", text(f'<img src="{url}">')
    yield "Markdown in a text", text(f"![x]({url})")
    yield "base64 in lines of 40", text("\n".join(code[i : i + 40] for i in range(0, len(code), 40)))
    yield "base64 in lines of 4", text("\n".join(code[i : i + 4] for i in range(0, len(code), 4)))
    yield "a word before the base64", text(f"image{code}")
    yield "SVG that embeds the image", text(f"<svg xmlns='http://www.w3.org/2000/svg'><image href='{url}'/></svg>")
    yield "base64 in two blocks", {"content": [{"type": "text", "text": part} for part in (code[:half], code[half:])]}
    yield "base64 backwards", text(code[::-1])
    yield "base64 of base64", text(base64.b64encode(code.encode()).decode())
    yield "hexadecimal", text(data.hex())
    yield "base85", text(base64.b85encode(data).decode())
    yield "gzip", text(base64.b64encode(gzip.compress(data)).decode())
    yield "a key instead of a value", {"content": [], "structuredContent": {code: 1}}
    yield "a link", text("![x](https://images.example/x.png)")


def outcome(content: dict[str, Any]) -> str:
    """What the proxy does with the message."""
    raw = json.dumps({"jsonrpc": "2.0", "id": 1, "result": content}).encode()
    try:
        reading = messages.read(raw, Limits())
    except Refused as refusal:
        return f"refused ({refusal.code})"
    if not reading.spans:
        return "passes"
    written = messages.write(reading, [NEW if span.data else None for span in reading.spans])
    return "replaced" if NEW.data.encode() in written or messages.EMPTY_URL.encode() in written else "passes"


def main() -> None:
    data = images.encode(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)))
    print("| an image as | the proxy |\n|---|---|")
    for name, content in carriers(data):
        print(f"| {name} | {outcome(content)} |")


if __name__ == "__main__":
    main()
