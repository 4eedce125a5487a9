"""From the URL of an image (data:, file:, http:, https:) to the bytes behind it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jaxserve.media.fetch import Fetcher
from jaxserve.media.policy import MediaPolicy
from jaxserve.media.refusal import refused

_BLANKS = str.maketrans("", "", " \t\r\n")
_PADDING = "= \t\r\n"
_PART = 2**18  # characters that are decoded at a time: no other thread runs meanwhile


async def read_url(url: str, where: str, policy: MediaPolicy, fetcher: Fetcher) -> bytes:
    """The file that `url` names; `where` is its place in the request.

    What the URL or a server says about the file's type counts for nothing: the decoder finds out.

    Raises RequestError for what is broken, too large, or not allowed here.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return await asyncio.to_thread(_from_data, url, where, policy.max_bytes)
    if scheme in ("http", "https"):
        return await fetcher.fetch(url, where)
    if scheme == "file":
        return await asyncio.to_thread(_from_file, url, where, policy)
    raise refused(where, f"must be a data:, https:, http: or file: URL, got {url!r:.60}")


def _from_data(url: str, where: str, max_bytes: int) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refused(where, f"must be of the form data:image/png;base64,…, got {url!r:.60}")
    if len(text) > max_bytes * 3 // 2:
        raise refused(where, f"holds an image larger than this server's limit of {max_bytes} bytes")
    try:
        data = _decoded(text)
    except (binascii.Error, ValueError) as error:
        raise refused(where, f"is not valid base64: {error}") from error
    if len(data) > max_bytes:
        raise refused(where, f"holds an image larger than this server's limit of {max_bytes} bytes")
    return data


def _decoded(text: str) -> bytes:
    """The bytes of base64.  Raises ValueError, of which binascii.Error is one, for what is none."""
    bare = text.rstrip(_PADDING)
    padding = "=" * text.count("=", len(bare))
    if "=" in bare:
        raise ValueError("Excess data after padding")
    decoded = []
    left = ""  # of a group of four characters
    for start in range(0, len(bare), _PART):
        # Line ends are what command line tools put in; anything else that is not base64 is a mistake.
        part = left + bare[start : start + _PART].translate(_BLANKS)
        whole = len(part) // 4 * 4
        decoded.append(base64.b64decode(part[:whole], validate=True))
        left = part[whole:]
    if (
        left or not bare
    ):  # padding that no group needs does no harm: some programs add it to whatever they have
        decoded.append(base64.b64decode(left + padding, validate=True))
    return b"".join(decoded)


def _from_file(url: str, where: str, policy: MediaPolicy) -> bytes:
    directory = policy.allowed_directory
    if directory is None:
        raise refused(
            where,
            "is a file: URL, and this server reads none: send the image as a data: URL. The operator may allow a "
            "directory with --allowed-local-media-path",
        )
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise refused(where, f"must be of the form file:///directory/name, got {url!r:.60}")
        path = Path(unquote(parts.path)).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, or links in a circle
        raise refused(where, "is not a valid file: URL") from error
    if directory not in path.parents:  # before anything is said about whether it exists
        raise refused(where, "is outside of the directory of --allowed-local-media-path")
    try:
        return _read(path, where, policy.max_bytes)
    except OSError as error:
        raise refused(where, f"cannot be read: {error.strerror}") from error


def _read(path: Path, where: str, max_bytes: int) -> bytes:
    # Opening a pipe would wait for its writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise refused(where, "is not a file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise refused(where, f"is larger than this server's limit of {max_bytes} bytes")
    return data
