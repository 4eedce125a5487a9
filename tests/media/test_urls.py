"""data: and file: URLs."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from jaxserve.errors import RequestError
from jaxserve.media.fetch import Fetcher
from jaxserve.media.policy import MediaPolicy
from jaxserve.media.urls import read_url

WHERE = "messages[0].content[1]"


async def read(url: str, policy: MediaPolicy | None = None) -> bytes:
    policy = policy or MediaPolicy()
    return await read_url(url, WHERE, policy, Fetcher(policy))


async def refusal(url: str, policy: MediaPolicy | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        await read(url, policy)
    assert caught.value.param == "messages"
    assert str(caught.value).startswith(WHERE)
    return str(caught.value)


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:;BASE64,", "data:text/html;x=1;base64,"])
async def test_data(head: str) -> None:
    assert await read(head + base64.b64encode(b"\xff\x00abc").decode()) == b"\xff\x00abc"


async def test_base64_is_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 5
    for size in (1, 5, 64, 75):
        monkeypatch.setattr("jaxserve.media.urls._PART", size)
        for length in (0, 1, 2, 3, 1279, 1280):
            for encode in (base64.b64encode, base64.encodebytes):
                assert await read("data:;base64," + encode(data[:length]).decode()) == data[:length]
        for more in ("=", "==", "\n=\n="):  # than is needed: some programs add it to whatever they have
            assert await read("data:;base64,YWJj" + more) == b"abc"
        for wrong in ("YWI=YWI=", "YQ==\nYQ==", "YWJjZ", "YWI==", "=", "YWJjZ==="):
            assert "is not valid base64" in await refusal("data:;base64," + wrong)


async def test_line_ends_in_base64() -> None:
    assert await read("data:;base64,YW\r\nJj \n") == b"abc"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png,abc", "must be of the form data:image/png;base64"),
        ("data:image/png;base64", "must be of the form"),
        ("data:;base64,a*bc", "is not valid base64"),
        ("data:;base64,abc", "is not valid base64"),
        ("data:;base64,äöü=", "is not valid base64"),
        ("data:;base64,YW-_", "is not valid base64"),
        ("iVBORw0KGgo=", "must be a data:, https:, http: or file: URL, got 'iVBORw0KGgo='"),
        ("ftp://example.com/a.png", "must be a data:"),
        ("javascript:alert(1)", "must be a data:"),
        ("/etc/passwd", "must be a data:"),
    ],
)
async def test_bad_urls(url: str, says: str) -> None:
    assert says in await refusal(url)


async def test_data_that_is_too_large() -> None:
    policy = MediaPolicy(max_bytes=100)
    assert len(await read("data:;base64," + base64.b64encode(b"a" * 100).decode(), policy)) == 100
    for size in (101, 1000):
        said = await refusal("data:;base64," + base64.b64encode(b"a" * size).decode(), policy)
        assert "larger than this server's limit of 100 bytes" in said


async def test_files_are_read_where_the_operator_allows_it(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"abc")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link.png").symlink_to(tmp_path / "a b.png")
    policy = MediaPolicy(allowed_directory=tmp_path)
    assert await read(f"file://{tmp_path}/a%20b.png", policy) == b"abc"
    assert await read(f"file://localhost{tmp_path}/inner/../a b.png", policy) == b"abc"
    assert await read(f"file://{tmp_path}/inner/link.png", policy) == b"abc"
    assert "--allowed-local-media-path" in await refusal(f"file://{tmp_path}/a%20b.png")


async def test_files_elsewhere_are_not_read(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.png"
    inside.mkdir()
    outside.write_bytes(b"secret")
    (inside / "link.png").symlink_to(outside)
    (inside / "circle").symlink_to(inside / "circle")
    policy = MediaPolicy(allowed_directory=inside)
    elsewhere = [
        f"file://{outside}",
        f"file://{inside}/../outside.png",
        f"file://{inside}/%2e%2e/outside.png",
        f"file://{inside}/link.png",
        f"file://{tmp_path}/inside-not",
        "file:///etc/passwd",
        f"file://{inside}",
        "file:///etc/there/is/no/such/file",  # the same words: whether it exists is not told
    ]
    for url in elsewhere:
        assert "is outside of the directory of --allowed-local-media-path" in await refusal(url, policy)
    assert "must be of the form" in await refusal(f"file://host{inside}/a.png", policy)
    assert "is not a valid file: URL" in await refusal(f"file://{inside}/a%00.png", policy)
    assert "cannot be read: No such file" in await refusal(f"file://{inside}/none.png", policy)
    await refusal(f"file://{inside}/circle", policy)


async def test_what_is_no_file_or_too_large(tmp_path: Path) -> None:
    policy = MediaPolicy(allowed_directory=tmp_path, max_bytes=10)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large.png").write_bytes(b"a" * 11)
    assert "is not a file" in await refusal(f"file://{tmp_path}/pipe", policy)
    assert "cannot be read: Is a directory" in await refusal(f"file://{tmp_path}/folder", policy)
    assert "limit of 10 bytes" in await refusal(f"file://{tmp_path}/large.png", policy)
