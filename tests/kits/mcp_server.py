"""A server of the official SDK with every kind of image, and texts that only look like some. Run by the tests."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Image, MCPServer
from mcp_types import BlobResourceContents, EmbeddedResource, ImageContent, TextContent

FILE = Path(os.environ.get("MCP_TEST_IMAGE", ""))
server = MCPServer("kitchen")


def data() -> str:
    return base64.b64encode(FILE.read_bytes()).decode()


@server.tool(structured_output=False)
def screenshot() -> list[Any]:
    return ["a page", Image(data=FILE.read_bytes(), format="png")]


@server.tool()
def echo(text: str) -> str:
    return text


@server.tool()
def fields() -> dict[str, Any]:
    return {"shot": data(), "page": f"<img src='data:image/png;base64,{data()}'> text", "size": 1.5, "name": "naïve ☕"}


@server.tool(structured_output=False)
def attached() -> list[Any]:
    blob = BlobResourceContents(uri="file:///x.bin", mime_type="application/octet-stream", blob=data())
    return [EmbeddedResource(type="resource", resource=blob), TextContent(type="text", text=json.dumps({"at": data()}))]


@server.tool(structured_output=False)
def broken() -> list[Any]:
    return [ImageContent(type="image", data="bm90IGFuIGltYWdl", mime_type="image/png")]


@server.tool()
def leave() -> str:
    os._exit(3)


@server.resource("shot://page", mime_type="application/octet-stream")
def page() -> bytes:
    return FILE.read_bytes()


@server.resource("note://plain")
def note() -> str:
    return "iVBORw0KGgo is how PNG begins; data:image/png;base64 is a head"


@server.prompt()
def look() -> list[Any]:
    return [{"role": "user", "content": {"type": "image", "data": data(), "mimeType": "image/png"}}]


if __name__ == "__main__":
    server.run("stdio") if len(sys.argv) < 2 else server.run("streamable-http", port=int(sys.argv[1]))
