"""The Quart application: routes, and what happens around every request."""

from __future__ import annotations

import time

from quart import Quart, Response, current_app, g, request
from werkzeug.exceptions import MethodNotAllowed, NotFound, RequestEntityTooLarge

from jaxserve.async_llm import AsyncLLM
from jaxserve.server import system
from jaxserve.server.access_log import log_request
from jaxserve.server.auth import check_api_key
from jaxserve.server.chat import chat_completions
from jaxserve.server.completions import completions
from jaxserve.server.cors import add_cors_headers, answer_preflight, is_preflight
from jaxserve.server.errors import ApiError, to_api_error
from jaxserve.server.intake import begin_request_id
from jaxserve.server.missing import explained
from jaxserve.server.render import render_chat, render_completion
from jaxserve.server.respond import error_response
from jaxserve.server.root_path import strip_root_path
from jaxserve.server.settings import MIB, ServerSettings
from jaxserve.server.state import ServerState
from jaxserve.server.tokens import detokenize, tokenize

MAX_TEXT_BODY = 4 * MIB  # of a request, where the operator says nothing
MAX_IMAGE_BODY = 64 * MIB  # likewise, for a model that takes images


def create_app(llm: AsyncLLM, settings: ServerSettings) -> Quart:
    """The application that serves `llm`.  Raises ConfigError for settings that cannot work together."""
    app = Quart(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes or min(
        MAX_TEXT_BODY if llm.info.images is None else MAX_IMAGE_BODY, settings.max_total_body_bytes
    )
    app.config["BODY_TIMEOUT"] = None  # read_body has one; Quart's misses a client that leaves just then
    # Connection has a limit for who reads nothing; Quart's would cut off who reads for a minute.
    app.config["RESPONSE_TIMEOUT"] = None
    app.url_map.merge_slashes = False  # werkzeug would send the client to whatever host its Host header names
    app.json.sort_keys = False  # pyright: ignore[reportAttributeAccessIssue]  # of the default provider
    state = ServerState.build(llm, settings)
    _add_routes(app, state)
    _add_hooks(app, state)
    asgi_app = state.bodies.counted(app.asgi_app)
    if settings.root_path:
        asgi_app = strip_root_path(asgi_app, settings.root_path)
    app.asgi_app = asgi_app  # pyright: ignore[reportAttributeAccessIssue]
    return app


def _add_routes(app: Quart, state: ServerState) -> None:
    @app.get("/health", endpoint="health")
    async def _health() -> Response:
        return system.health(state)

    @app.route("/ping", methods=["GET", "POST"], endpoint="ping")
    async def _ping() -> Response:
        return system.health(state)

    @app.get("/version", endpoint="version")
    async def _version() -> Response:
        return system.version()

    @app.get("/load", endpoint="load")
    async def _load() -> Response:
        return system.load(state)

    @app.get("/metrics", endpoint="metrics")
    async def _metrics() -> Response:
        return system.metrics(state)

    @app.get("/v1/models", endpoint="models")
    async def _models() -> Response:
        return system.models(state)

    @app.get("/v1/models/<path:name>", endpoint="model")
    async def _model(name: str) -> Response:
        return system.model(state, name)

    @app.post("/v1/chat/completions", endpoint="chat_completions")
    async def _chat_completions() -> Response:
        state.check_open()
        return await chat_completions(state, request)

    @app.post("/v1/completions", endpoint="completions")
    async def _completions() -> Response:
        state.check_open()
        return await completions(state, request)

    @app.post("/v1/chat/completions/render", endpoint="render_chat")
    async def _render_chat() -> Response:
        return await render_chat(state, request)

    @app.post("/v1/completions/render", endpoint="render_completion")
    async def _render_completion() -> Response:
        return await render_completion(state, request)

    @app.post("/tokenize", endpoint="tokenize")
    async def _tokenize() -> Response:
        return await tokenize(state, request)

    @app.post("/detokenize", endpoint="detokenize")
    async def _detokenize() -> Response:
        return await detokenize(state, request)


def _add_hooks(app: Quart, state: ServerState) -> None:
    settings = state.settings

    @app.before_request
    async def _enter() -> Response | None:
        g.started_at = time.monotonic()
        begin_request_id(request)
        if is_preflight(request):
            return answer_preflight(request, settings.allowed_origins)
        check_api_key(request, settings.api_keys)
        return None

    @app.after_request
    async def _leave(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        add_cors_headers(request, response, settings.allowed_origins)
        route = request.url_rule.rule if request.url_rule is not None else "none"
        state.metrics.count_http(request.method, route, response.status_code)
        if settings.log_requests and request.path not in settings.unlogged_paths:
            log_request(request, response)
        return response

    @app.errorhandler(Exception)
    async def _answer_error(error: Exception) -> Response:
        if isinstance(error, NotFound) and (target := _tidied(app)) is not None:
            return Response("", 307, {"Location": settings.root_path + target})
        return error_response(_worded(error))


def _worded(error: Exception) -> ApiError:
    """The answer to an exception; routing's errors and the body limit get their details here."""
    if isinstance(error, NotFound):
        routes = [rule.rule for rule in current_app.url_map.iter_rules()]
        return ApiError(
            404, f"There is no {request.path!r:.200} on this server{explained(request.path, routes)}"
        )
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
        message = f"{request.method} is not allowed for {request.path!r:.200}: use {allowed}."
        return ApiError(405, message, headers={"Allow": allowed})
    if isinstance(error, RequestEntityTooLarge):
        limit = current_app.config["MAX_CONTENT_LENGTH"]
        return ApiError(
            413, f"The request body is larger than this server's limit of {limit} bytes.", param="body"
        )
    return to_api_error(error, g.request_id)


def _tidied(app: Quart) -> str | None:
    """The route that the request's path would be without its last slash and with single ones, if there is one."""
    path = "/" + "/".join(filter(None, request.path.split("/")))
    if path in (request.path, "/"):
        return None
    adapter = app.create_url_adapter(request)
    return path if adapter is not None and adapter.test(path, request.method) else None
