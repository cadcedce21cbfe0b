"""The files of the console's page, in memory, as they are and compressed.

`load` reads them once; `application` answers with them. The promise: nothing outside the directory can be asked for,
because a path is only looked up among the names that were read.
"""

import gzip
import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

DIRECTORY = Path(__file__).parent / "static"
INDEX = "index.html"

_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}
_LEAST_GAIN = 0.9
"""A file is sent compressed if that makes it smaller than this part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """A file of the page."""

    content: bytes
    compressed: bytes | None
    """By gzip; None if that gains little."""
    media_type: str
    tag: str
    """Changes with the content."""

    def response(self, request: Request) -> Response:
        """The file, compressed if the client takes that, or 304 if the client has it."""
        body, tag = self.content, f'"{self.tag}"'
        headers = {"cache-control": "no-cache"}
        if self.compressed is not None:
            headers["vary"] = "accept-encoding"
            if _takes_gzip(request.headers.get("accept-encoding", "")):
                body, tag = self.compressed, f'"{self.tag}-gzip"'
                headers["content-encoding"] = "gzip"
        headers["etag"] = tag
        known = request.headers.get("if-none-match", "")
        if tag in [one.strip().removeprefix("W/") for one in known.split(",")]:
            headers.pop("content-encoding", None)
            return Response(status_code=304, headers=headers)
        return Response(body, headers={**headers, "content-type": self.media_type})


@cache
def load(directory: Path = DIRECTORY) -> Mapping[str, Asset]:
    """All files below the directory, by their paths from there."""
    return {path.relative_to(directory).as_posix(): _asset(path) for path in directory.rglob("*") if path.is_file()}


def _asset(path: Path) -> Asset:
    content = path.read_bytes()
    # No time in it: all processes of a broker must agree on the bytes.
    compressed = gzip.compress(content, 9, mtime=0)
    guessed, _ = mimetypes.guess_type(path.name)
    return Asset(
        content=content,
        compressed=compressed if len(compressed) < _LEAST_GAIN * len(content) else None,
        media_type=_TYPES.get(path.suffix) or guessed or "text/plain; charset=utf-8",
        tag=hashlib.sha256(content).hexdigest()[:16],
    )


def _takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding has gzip.

    >>> [_takes_gzip(text) for text in ("gzip, br", "br", "gzip;q=0", "GZIP ; q=0.5")]
    [True, False, False, True]
    """
    for one in accepted.lower().split(","):
        coding, _, weight = one.partition(";")
        if coding.strip() == "gzip":
            return weight.strip().removeprefix("q=").strip("0.") != "" or not weight
    return False
