"""Fetches a file over HTTP(S) from public addresses only, within limits of time, size and redirects."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urljoin

import httpcore
import httpx

from jaxserve.media.policy import MediaPolicy
from jaxserve.media.refusal import refused

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_ADDRESSES = 4  # of a host's, that are tried in turn
_LOOKUPS = 8  # at a time


class Fetcher:
    """Fetches by one policy.  Usable on any event loop; keeps no connection open."""

    def __init__(self, policy: MediaPolicy) -> None:
        self._policy = policy
        self._backend = _CheckedBackend(policy)
        self._ssl_context: ssl.SSLContext | None = None

    async def fetch(self, url: str, where: str) -> bytes:
        """The file at `url`; `where` is the URL's place in the request.

        Redirects are followed by hand, each under the rules of the first URL.  A host's name is looked up once
        for a connection, all its addresses are judged, and one of those is connected to: what it means cannot
        change in between.  Proxies of the environment are not used.

        Raises RequestError for whatever keeps the file from arriving.
        """
        seconds = self._policy.fetch_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._follow(url, where)
        except TimeoutError:
            raise refused(where, f"did not arrive within {seconds:g} seconds") from None
        except _AddressError as error:
            raise refused(where, str(error)) from error
        except (OSError, UnicodeError) as error:  # of the look-up
            raise refused(where, "names a host that is not known") from error
        except (
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.TimeoutException,
            httpcore.UnsupportedProtocol,
        ) as error:
            raise refused(where, f"could not be fetched ({type(error).__name__})") from error

    async def _follow(self, url: str, where: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(self._checked(url, where), where)
            if isinstance(answer, bytes):
                return answer
            try:
                url = urljoin(url, answer)
            except ValueError as error:
                raise refused(where, "was redirected to what is not a valid URL") from error
        raise refused(where, f"was redirected more than {MAX_REDIRECTS} times")

    def _checked(self, url: str, where: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise refused(where, "is not a valid URL") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise refused(where, f"leads to a URL that is not http(s): {url!r:.60}")
        if parsed.port is not None and not 0 < parsed.port < 65536:
            raise refused(where, "is not a valid URL: ports are from 1 to 65535")
        if parsed.userinfo:
            raise refused(where, "must not hold a user name or password")
        allowed = self._policy.allowed_domains
        if not allowed:
            raise refused(
                where,
                "is an http(s) URL, and this server fetches none: send the image as a data: URL. The operator may "
                "allow hosts with --allowed-media-domains",
            )
        names = (parsed.host.lower(), parsed.raw_host.decode().lower())  # as people write it, and in ASCII
        if "*" not in allowed and not set(names) & set(allowed):
            raise refused(
                where,
                f"leads to the host {parsed.host!r:.100}, which is not one of --allowed-media-domains",
            )
        return parsed

    async def _get(self, url: httpx.URL, where: str) -> bytes | str:
        """The file, or where the server says it is."""
        limit = self._policy.max_bytes
        headers = [
            (b"Host", url.netloc),
            (b"User-Agent", b"jaxserve"),
            (b"Accept", b"image/*"),
            (b"Accept-Encoding", b"identity"),
        ]
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=await self._tls() if url.scheme == "https" else None,
                network_backend=self._backend,
            ) as pool,
            pool.stream("GET", target, headers=headers) as response,
        ):
            answered = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in answered:
                return answered[b"location"].decode("latin-1")
            if response.status != 200:
                raise refused(where, f"could not be fetched: its server answers {response.status}")
            if answered.get(b"content-encoding", b"identity").lower() != b"identity":
                raise refused(where, "was sent compressed by its server, though it was asked not to")
            chunks, num_bytes = [], 0
            async for chunk in response.aiter_stream():
                num_bytes += len(chunk)
                if num_bytes > limit:
                    raise refused(where, f"is larger than this server's limit of {limit} bytes")
                chunks.append(chunk)
        return b"".join(chunks)

    async def _tls(self) -> ssl.SSLContext:
        if self._ssl_context is None:  # reads the certificates of all authorities, hence the thread
            self._ssl_context = await asyncio.to_thread(httpcore.default_ssl_context)
        return self._ssl_context


class _AddressError(Exception):
    """A host has an address that is not to be connected to."""


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that the policy allows: the one place where names become addresses."""

    def __init__(self, policy: MediaPolicy) -> None:
        self._is_allowed = policy.is_allowed_address
        # Nothing ends a look-up before its time, and strangers choose which servers are asked: on the event loop's own
        # threads, everybody's prompts would wait for those.
        self._lookups = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="jaxserve-hosts")
        inner: Any = httpcore.AnyIOBackend()  # typed as what stands in for it where anyio is missing
        self._inner: httpcore.AsyncNetworkBackend = inner

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's face
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._lookups, look_up)
        # Numbers in whatever form (2130706433, 0177.1, 0x7f.1) are addresses by now.
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not addresses or not all(map(self._is_allowed, addresses)):
            # Not which address: the names of a private network are nobody's business.
            raise _AddressError(f"leads to the host {host!r:.100}, whose address is not a public one")
        error: Exception | None = None
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
        assert error is not None
        raise error

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's face
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise _AddressError("leads to a socket")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)
