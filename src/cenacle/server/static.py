"""The files of the web page.

Owns: `web/`, read once when the server starts, and how browsers may cache it.
Does not know: what the page does.
Invariant: only names in the table are answered, so no path leaves the folder. The page loads
nothing from other hosts, and has no script or style outside its files.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

WEB_DIR = Path(__file__).parent / "web"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


FRAME = "mermaid/frame.html"
FRAME_SCRIPT = re.compile(rb'<script src="([\w.]+)"></script>')


def _inline_scripts(files: dict[str, tuple[bytes, str]]) -> dict[str, str]:
    """Put the scripts of the frame that draws diagrams into it, since a document without an origin
    may load none; returns the headers that confine it to them: no network and no way out."""
    hashes = []

    def inline(match: re.Match[bytes]) -> bytes:
        script, _ = files.pop(f"mermaid/{match[1].decode()}")
        script = script.replace(b"</script", rb"<\/script")
        hashes.append(base64.b64encode(hashlib.sha256(script).digest()).decode())
        return b"<script>" + script + b"</script>"

    html, media_type = files[FRAME]
    files[FRAME] = FRAME_SCRIPT.sub(inline, html), media_type
    scripts = " ".join(f"'sha256-{value}'" for value in hashes)
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
    )
    return {"content-security-policy": policy, "x-frame-options": "SAMEORIGIN"}


def routes() -> list[Route]:
    """The routes / (the page) and /static/PATH.

    Unlike starlette's `StaticFiles`, tags are made from contents: packages can keep a file's size
    and time over an update.
    """
    files = {
        path.relative_to(WEB_DIR).as_posix(): (path.read_bytes(), MEDIA_TYPES[path.suffix])
        for path in WEB_DIR.rglob("*")
        if path.suffix in MEDIA_TYPES
    }
    frame_headers = _inline_scripts(files)
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, (data, _) in files.items()}

    async def respond(http: Request) -> Response:
        name = http.path_params.get("name", "index.html")
        if name not in files:
            raise HTTPException(404)
        data, media_type = files[name]
        # Cached, but validated each time: after an update no old file runs beside a new one.
        headers = {"etag": tags[name], "cache-control": "no-cache"}
        if name == FRAME:
            headers |= frame_headers
        if tags[name] in http.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=media_type)

    return [Route("/", respond), Route("/static/{name:path}", respond)]
