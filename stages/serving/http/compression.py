"""Compressed bodies: gzip and deflate, bounded when read."""

from __future__ import annotations

import gzip
import zlib

from stages.serving.limits import too_large
from stages.serving.values import Fault, ServingError

SMALLEST_BYTES = 512
"""Smaller answers are not compressed."""

LEVEL = 1
"""Activations hardly compress: the fastest level."""


def decompressed(body: bytes, coding: str, limit_bytes: int) -> bytes:
    """The body under its `Content-Encoding`. Reads no more than the limit. Raises `ServingError`."""
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise ServingError(Fault.INVALID, f"Content-Encoding {coding!r:.40}: gzip or deflate expected")
    # deflate has a zlib header by the standard, but some clients leave it out
    raw = coding == "deflate" and body[:1] and (body[0] & 0x0F) != 8
    reader = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
    try:
        found = reader.decompress(body, limit_bytes + 1)
    except zlib.error:
        raise ServingError(Fault.INVALID, f"the body is not {coding}") from None
    if len(found) > limit_bytes:
        raise too_large(limit_bytes)
    if not reader.eof:
        raise ServingError(Fault.INVALID, f"the {coding} body is truncated")
    if reader.unused_data:
        raise ServingError(Fault.INVALID, f"{len(reader.unused_data):,} bytes follow the {coding} body")
    return found


def accepted_coding(header: str) -> str:
    """The coding that an `Accept-Encoding` header asks for: `gzip`, `deflate` or empty."""
    for entry in header.lower().split(","):
        coding, _, weight = entry.strip().partition(";")
        if coding.strip() in ("gzip", "deflate") and weight.replace(" ", "") not in (
            "q=0",
            "q=0.0",
            "q=0.00",
            "q=0.000",
        ):
            return coding.strip()
    return ""


def compressed(body: bytes, coding: str) -> bytes:
    """The body in a coding."""
    return gzip.compress(body, LEVEL, mtime=0) if coding == "gzip" else zlib.compress(body, LEVEL)
