"""Fetching: only what is public, small, quick and allowed."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.media.addresses import is_public
from jaxserve.media.fetch import Fetcher
from jaxserve.media.policy import MediaPolicy
from tests.deaf_port import deaf_port
from tests.media.web import answer, is_allowed, web
from tests.patience import PATIENCE

TLS = Path(__file__).parents[1] / "data" / "tls"
WHERE = "messages[0].content[1]"


def policy(**changes: Any) -> MediaPolicy:
    usual: dict[str, Any] = {"allowed_domains": ("*",), "is_allowed_address": is_allowed}
    return MediaPolicy(**{**usual, "fetch_seconds": PATIENCE, **changes})


async def refusal(url: str, chosen: MediaPolicy | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        await Fetcher(chosen or policy()).fetch(url, WHERE)
    assert caught.value.param == "messages"
    assert str(caught.value).startswith(WHERE)
    return str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.0.9", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "ff0e::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "100::1"),
        *("fec0::1", "localhost", ""),
    ],
)
def test_addresses_that_are_nobodys_business(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "172.32.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


async def test_a_file_is_fetched() -> None:
    async with web({"/a.png?b=c": answer(b"abc")}) as here:
        assert await Fetcher(policy()).fetch(here.url("/a.png?b=c"), WHERE) == b"abc"
        assert await Fetcher(policy(allowed_domains=("127.0.0.1",))).fetch(here.url("/a.png?b=c"), WHERE)


async def test_nothing_is_fetched_unless_the_operator_says_so() -> None:
    async with web({}) as here:
        said = await refusal(here.url("/"), policy(allowed_domains=()))
        assert "send the image as a data: URL" in said
        assert "--allowed-media-domains" in said
        assert "is not one of --allowed-media-domains" in await refusal(
            here.url("/"), policy(allowed_domains=("example.com",))
        )
        assert here.asked == []


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "[::1]"),
        *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "10.0.0.1", "169.254.169.254"),
    ],
)
async def test_private_hosts_in_every_writing(host: str) -> None:
    async with web({}) as here:
        said = await refusal(here.url("/", host), MediaPolicy(allowed_domains=("*",), fetch_seconds=PATIENCE))
        assert "whose address is not a public one" in said or "not a valid URL" in said
        assert here.asked == []


async def test_a_name_is_looked_up_once_and_all_its_addresses_count(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    addresses = ["127.0.0.1"]

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    async with web({"/": answer(b"abc")}) as here:
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        url = here.url("/", "images.example.com")
        assert await Fetcher(policy()).fetch(url, WHERE) == b"abc"
        assert looked_up[0] == "images.example.com"
        assert set(looked_up[1:]) <= {"127.0.0.1"}  # the address alone, if anything, is looked at again
        addresses.append("127.0.0.2")
        assert "whose address is not a public one" in await refusal(url)
        assert here.asked == ["/"]


async def test_names_that_take_long_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, asked, found = asyncio.get_running_loop(), asyncio.Semaphore(0), threading.Event()

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        loop.call_soon_threadsafe(asked.release)
        assert found.wait(PATIENCE)
        raise socket.gaierror("nobody knows")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    fetcher = Fetcher(policy())
    loop.set_default_executor(ThreadPoolExecutor(2))
    fetches = [asyncio.ensure_future(fetcher.fetch(f"http://{name}.example.com/", WHERE)) for name in "abcd"]
    for _ in range(2):
        await asked.acquire()
    try:
        assert await asyncio.to_thread(found.is_set) is False
    finally:
        found.set()
    answers = await asyncio.gather(*fetches, return_exceptions=True)
    assert all("names a host that is not known" in str(answer) for answer in answers)


async def test_redirects_are_followed_under_the_same_rules() -> None:
    pages = {
        "/1": answer(status="302 Found", Location="/2"),
        "/2": answer(status="308 Permanent Redirect", Location="http://127.0.0.1:{port}/image"),
        "/image": answer(b"abc"),
        "/private": answer(status="302 Found", Location="http://127.0.0.2:{port}/image"),
        "/named": answer(status="302 Found", Location="http://localhost:{port}/image"),
        "/file": answer(status="302 Found", Location="file:///etc/passwd"),
        "/other": answer(status="302 Found", Location="gopher://127.0.0.1:{port}/"),
        "/circle": answer(status="302 Found", Location="/circle"),
        "/broken": answer(status="302 Found", Location="http://[::1"),
        "/nowhere": answer(status="302 Found"),
    }
    async with web(pages) as here:
        assert await Fetcher(policy()).fetch(here.url("/1"), WHERE) == b"abc"
        here.asked.clear()
        assert "whose address is not a public one" in await refusal(here.url("/private"))
        chosen = policy(allowed_domains=("127.0.0.1",))
        assert "'localhost', which is not one of" in await refusal(here.url("/named"), chosen)
        assert "not http(s): 'file:///etc/passwd'" in await refusal(here.url("/file"))
        assert "not http(s)" in await refusal(here.url("/other"))
        assert "answers 302" in await refusal(here.url("/nowhere"))
        assert "redirected more than 3 times" in await refusal(here.url("/circle"))
        assert "redirected to what is not a valid URL" in await refusal(here.url("/broken"))
        assert here.asked == [
            "/private",
            "/named",
            "/file",
            "/other",
            "/nowhere",
            *["/circle"] * 4,
            "/broken",
        ]


async def test_slow_hosts() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"
    async with web({"/silent": None, "/half": start}) as here:
        chosen = policy(fetch_seconds=0.2)
        assert "did not arrive within 0.2 seconds" in await refusal(here.url("/silent"), chosen)
        assert "could not be fetched (RemoteProtocolError)" in await refusal(here.url("/half"))


async def test_large_files_whatever_their_head_says() -> None:
    unsaid = b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 2000
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"3e8\r\n" + b"a" * 1000 + b"\r\n") * 2
    )
    async with web({"/said": answer(b"a" * 2000), "/unsaid": unsaid, "/chunked": chunked}) as here:
        for path in ("/said", "/unsaid", "/chunked"):
            said = await refusal(here.url(path), policy(max_bytes=1000))
            assert "is larger than this server's limit of 1000 bytes" in said


async def test_certificates_must_be_of_the_host_that_the_url_names(monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = TLS / "test_only_certificate.pem"  # of 127.0.0.1 and localhost
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, TLS / "test_only_key.pem")
    trusting = ssl.create_default_context(cafile=certificate)

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with web({"/": answer(b"abc")}, server) as here:
        named, other = f"https://localhost:{here.port}/", f"https://example.com:{here.port}/"
        assert "could not be fetched (ConnectError)" in await refusal(named)  # nobody has signed it
        monkeypatch.setattr("httpcore.default_ssl_context", lambda: trusting)
        assert await Fetcher(policy()).fetch(named, WHERE) == b"abc"
        assert "could not be fetched (ConnectError)" in await refusal(other)


async def test_other_refusals() -> None:
    pages = {
        "/404": answer(status="404 Not Found"),
        "/500": answer(status="500 Oops"),
        "/gzip": answer(b"abc", Content_Encoding="gzip"),
        "/nonsense": b"SSH-2.0-OpenSSH\r\n",
    }
    async with web(pages) as here:
        assert "answers 404" in await refusal(here.url("/404"))
        assert "answers 500" in await refusal(here.url("/500"))
        assert "was sent compressed" in await refusal(here.url("/gzip"))
        assert "RemoteProtocolError" in await refusal(here.url("/nonsense"))
        assert "user name or password" in await refusal(here.url("/", "user:secret@127.0.0.1"))
    with deaf_port() as port:
        assert "could not be fetched (ConnectError)" in await refusal(f"http://127.0.0.1:{port}/")
    assert "is not a valid URL" in await refusal("http://[::1/")
    for wrong in (0, 65536, 2**64):
        assert "is not a valid URL" in await refusal(f"http://127.0.0.1:{wrong}/")
    assert "not http(s)" in await refusal("http:///a.png")
    assert "names a host that is not known" in await refusal("http://" + "a" * 70 + ".com/")
