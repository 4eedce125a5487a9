"""The OpenAI API over HTTP: `create_app` makes the application, `serve` runs it."""

from jaxserve.server.app import create_app
from jaxserve.server.launch import serve
from jaxserve.server.listen import bind_socket
from jaxserve.server.settings import ServerSettings

__all__ = ["ServerSettings", "bind_socket", "create_app", "serve"]
