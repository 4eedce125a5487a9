"""Taking the port before the model is loaded, and settings that cannot be."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.server import ServerSettings, bind_socket, create_app
from jaxserve.server.listen import address_of
from tests.server.serving import serving


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port={port}: 127\.0\.0\.1:{port} is in use.*--port"):
            bind_socket(ServerSettings(port=port))


def test_a_bound_port_is_taken_though_nobody_listens_yet():
    with bind_socket(ServerSettings(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match="is in use"):
            bind_socket(ServerSettings(port=port))
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass


def test_a_port_with_forgotten_connections_can_be_taken():
    with socket.create_server(("127.0.0.1", 0)) as earlier:
        port = earlier.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = earlier.accept()
        accepted.close()  # the side that closes first keeps TIME_WAIT
        client.close()
    with bind_socket(ServerSettings(port=port)) as sock:
        assert sock.getsockname()[1] == port


def test_an_address_of_somebody_else():
    with pytest.raises(ConfigError, match=r"host='192\.0\.2\.1'"):
        bind_socket(ServerSettings(host="192.0.2.1", port=0))
    with pytest.raises(ConfigError, match="host='no such host'"):
        bind_socket(ServerSettings(host="no such host", port=0))


def test_addresses():
    settings = ServerSettings(port=0, root_path="/llm")
    with bind_socket(settings) as sock:
        assert address_of(sock, settings) == f"http://127.0.0.1:{sock.getsockname()[1]}/llm"


def test_unix_sockets(tmp_path: Path):
    path = tmp_path / "a.sock"
    settings = ServerSettings(uds=str(path))
    with bind_socket(settings):
        pass  # a server that died leaves its socket behind
    with bind_socket(settings) as second:
        second.listen()
        with pytest.raises(ConfigError, match="another server listens there"):
            bind_socket(settings)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        bind_socket(ServerSettings(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ConfigError, match="uds="):
        bind_socket(ServerSettings(uds=str(tmp_path / "missing" / "a.sock")))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", ""),
        ("port", -1),
        ("port", 65536),
        ("uds", ""),
        ("api_keys", ("a", "")),
        ("served_model_names", ("",)),
        ("root_path", "llm"),
        ("root_path", "/llm/"),
        ("ssl_keyfile", "key.pem"),
        ("ssl_certfile", "cert.pem"),
        ("shutdown_timeout", -1),
        ("max_body_bytes", 10),
        ("max_total_body_bytes", 1000),
        ("metrics_prefix", "a b"),
        ("metrics_prefix", "1:"),
        ("receive_timeout", 0.0),
        ("chat_template_content_format", "parts"),
    ],
)
def test_settings_that_cannot_be(field: str, value: Any):
    name = "ssl_keyfile" if field == "ssl_certfile" else field
    with pytest.raises(ConfigError, match=name):
        ServerSettings(**{field: value})


def test_tls_files_that_cannot_be_read(tmp_path: Path):
    missing, broken = tmp_path / "missing.pem", tmp_path / "broken.pem"
    broken.write_text("no key")
    for path in (missing, broken):
        settings = ServerSettings(port=0, ssl_keyfile=str(path), ssl_certfile=str(path))
        with pytest.raises(ConfigError, match=rf"ssl_certfile='.*{path.name}'"):
            bind_socket(settings)


def test_a_chat_template_that_is_no_template():
    with serving() as served:
        settings = ServerSettings(chat_template="{% for %}")
        with pytest.raises(ConfigError, match="chat_template is not valid jinja2"):
            create_app(served.llm, settings)
