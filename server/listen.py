"""The listening socket: taken before the model is loaded, so that a busy port or a missing key is known at once."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.server.settings import ServerSettings


def bind_socket(settings: ServerSettings) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until `serve` takes it.

    Raises ConfigError when the address is in use or cannot be had, and for unusable TLS files.
    """
    _check_tls(settings)
    if settings.uds is not None:
        return _bind_unix(settings.uds)
    return _bind_tcp(settings.host, settings.port)


def address_of(sock: socket.socket, settings: ServerSettings) -> str:
    """The URL under which clients reach the server."""
    scheme = "http" if settings.ssl_certfile is None else "https"
    if settings.uds is not None:
        return f"{scheme}+unix://{settings.uds}"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"


def _check_tls(settings: ServerSettings) -> None:
    if settings.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"ssl_certfile={settings.ssl_certfile!r}, ssl_keyfile={settings.ssl_keyfile!r}: {error}"
        ) from error


def _bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"host={host!r}: {error.strerror}; give an address of this machine") from error
    sock = socket.socket(family, kind, protocol)
    try:
        _bind_alone(sock, address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port={port}: {host}:{port} is in use; stop what listens there or choose another --port"
            ) from error
        raise ConfigError(f"host={host!r}, port={port}: {error.strerror}") from error
    return sock


def _bind_alone(sock: socket.socket, address: tuple[Any, ...]) -> None:
    """Bind so that no other server can take the same port while this one loads its model.

    Under SO_REUSEADDR several sockets may be bound to one port until one of them listens, hence the first try
    without it; the second try is for connections of an earlier server that the kernel remembers (TIME_WAIT).
    """
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)


def _bind_unix(path: str) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"uds={path!r}: {error.strerror or error}") from error
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that a dead server left behind; refuse one that answers, and any other file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"uds={path!r}: there is a file of that name that is no socket; choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise ConfigError(f"uds={path!r}: another server listens there; stop it or choose another path")
