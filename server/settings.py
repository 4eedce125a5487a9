"""The operator's choices for the HTTP server, checked when built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.errors import ConfigError
from jaxserve.text.chat_template import OWN_NAMES

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Everything that `jaxserve serve` may say about HTTP; the engine's own settings are EngineConfig's."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one, printed at start
    uds: str | None = None  # path of a Unix socket, instead of host and port
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # any of them opens the door; none: no door
    served_model_names: tuple[str, ...] = ()  # the first one is what answers say; none: the model's own name
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    root_path: str = ""  # prefix under which a proxy publishes the server, e.g. "/llm"
    allowed_origins: tuple[str, ...] = ("*",)  # browsers' origins (CORS)
    shutdown_timeout: float = 30.0  # seconds that running requests get after the first SIGTERM
    max_body_bytes: int | None = None  # None: 4 MiB, or 64 MiB for a model that takes images
    max_total_body_bytes: int = 2048 * MIB  # of requests without an answer yet; beyond it new ones get 503
    receive_timeout: float = 60.0  # seconds that a request's head, and then its body, may take to arrive
    strict_params: bool = False  # unknown request fields are refused instead of named in a header
    enable_prompt_tokens_details: bool = False  # usage.prompt_tokens_details.cached_tokens
    enable_force_include_usage: bool = False  # streams end with their usage, asked for or not
    return_tokens_as_token_ids: bool = False  # logprobs say "token_id:123" instead of the token's text
    chat_template: str | None = None  # jinja2 source, instead of the model's own
    # auto: what the template reads
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    # variables of the template where a request sets no others
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trust_request_chat_template: bool = False  # requests may bring their own chat_template
    enable_auto_tool_choice: bool = False  # tool_choice "auto", which tools alone mean, is served
    tool_call_parser: str | None = None  # how the model writes calls; none: answers have no calls
    reasoning_parser: str | None = None  # how the model marks its reasoning; none: it is content
    tool_parser_plugin: str | None = None  # a file, written for vLLM, that registers tool parsers
    reasoning_parser_plugin: str | None = None  # likewise, reasoning parsers
    metrics_prefix: str = "jaxserve:"
    log_requests: bool = True
    unlogged_paths: tuple[str, ...] = ()  # requests for these get no line

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, wants: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {wants}")

        need(bool(self.host), "host", "give an address to listen on, e.g. 127.0.0.1 or 0.0.0.0")
        need(0 <= self.port <= 65535, "port", "must be from 0 to 65535")
        need(self.uds != "", "uds", "give the path of the socket")
        need(self.shutdown_timeout >= 0, "shutdown_timeout", "must be at least 0 seconds")
        need(self.receive_timeout > 0, "receive_timeout", "must be above 0 seconds")
        need(
            self.max_body_bytes is None or self.max_body_bytes >= 1024,
            "max_body_bytes",
            "must be at least 1024 bytes",
        )
        need(
            self.max_total_body_bytes >= (self.max_body_bytes or 1024),
            "max_total_body_bytes",
            f"must be at least 1024 bytes, and max_body_bytes (which is {self.max_body_bytes}): one request's own",
        )
        need(all(self.served_model_names), "served_model_names", "names must not be empty")
        need(
            self.root_path == "" or (self.root_path.startswith("/") and not self.root_path.endswith("/")),
            "root_path",
            "must start with a slash and not end with one, e.g. /llm",
        )
        need(
            not self.enable_auto_tool_choice or self.tool_call_parser is not None,
            "enable_auto_tool_choice",
            "needs tool_call_parser (--tool-call-parser), which says how the model writes calls",
        )
        need(
            (self.ssl_keyfile is None) == (self.ssl_certfile is None),
            "ssl_keyfile",
            f"needs ssl_certfile beside it (which is {self.ssl_certfile!r}), and the other way round",
        )
        need(
            re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?", self.metrics_prefix) is not None,
            "metrics_prefix",
            "use letters, digits, _ and :, not beginning with a digit",
        )
        need(
            self.chat_template_content_format in ("auto", "string", "openai"),
            "chat_template_content_format",
            "use auto, string or openai",
        )
        own = sorted(set(self.default_chat_template_kwargs) & OWN_NAMES)
        need(not own, "default_chat_template_kwargs", f"must not have {own}: requests have fields for them")
        if not all(self.api_keys):
            raise ConfigError("api_keys: a key must not be empty; leave --api-key out to serve without keys")
