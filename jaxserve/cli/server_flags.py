"""The flags of `jaxserve serve` that concern HTTP."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.json_values import json_object
from jaxserve.cli.quantities import num_bytes
from jaxserve.cli.vllm_flags import add_vllm_flags
from jaxserve.cli.vllm_server_options import SERVER_OPTIONS
from jaxserve.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from jaxserve.server.settings import ServerSettings


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ServerSettings, in vLLM's names where it has them, and vLLM's that are refused."""
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, default=8000, help="0 takes any free one (default: %(default)s)")
    add("--uds", metavar="PATH", help="listen on a Unix socket instead")
    add(
        "--served-model-name",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="names that requests may ask for (default: MODEL)",
    )
    add(
        "--api-key",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="requests must bring one of these keys (default: $VLLM_API_KEY, or none is asked for)",
    )
    add(
        "--chat-template",
        metavar="FILE",
        help="instead of the model's own: a jinja2 file, its text, the name of one of ours "
        "(tool_chat_template_hermes.jinja, or hermes) or of one of the model's (tool_use)",
    )
    add(
        "--chat-template-content-format",
        choices=("auto", "string", "openai"),
        default="auto",
        help="message contents for the template: text, or lists of parts (default: what it can take)",
    )
    add(
        "--default-chat-template-kwargs",
        type=json_object('{"enable_thinking": false}'),
        default={},
        metavar="JSON",
        help='variables of the chat template where requests set no others, e.g. {"enable_thinking": false}',
    )
    add(
        "--enable-auto-tool-choice",
        action="store_true",
        help="let the model decide whether to call tools (needs --tool-call-parser)",
    )
    add("--tool-call-parser", metavar="NAME", help="how the model writes tool calls, e.g. hermes")
    add("--reasoning-parser", metavar="NAME", help="how the model marks its reasoning, e.g. qwen3")
    add(
        "--tool-parser-plugin",
        metavar="FILE",
        help="Python file with tool parsers written for vLLM; --tool-call-parser takes their names",
    )
    add(
        "--reasoning-parser-plugin",
        metavar="FILE",
        help="the same for --reasoning-parser",
    )
    add("--ssl-keyfile", metavar="FILE")
    add("--ssl-certfile", metavar="FILE")
    add("--root-path", default="", metavar="PREFIX", help="prefix under which a proxy publishes the server")
    add(
        "--allowed-origins",
        type=_origins,
        default=("*",),
        metavar="JSON",
        help='browser origins, a JSON list (default: ["*"])',
    )
    add(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that running requests get after SIGTERM (default: %(default)s)",
    )
    add(
        "--max-body-bytes",
        type=num_bytes,
        metavar="BYTES",
        help="of a request (default: 4M, or 64M for a model that takes images)",
    )
    add(
        "--max-total-body-bytes",
        type=num_bytes,
        default=2 * 2**30,
        metavar="BYTES",
        help="of all requests that are not answered yet; beyond it those over 64K get 503 (default: 2G)",
    )
    add(
        "--receive-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="in which a request's head, and then its body, must arrive (default: %(default)s)",
    )
    add(
        "--strict-params",
        action="store_true",
        help="refuse unknown request fields instead of naming them in a header",
    )
    add(
        "--enable-prompt-tokens-details",
        action="store_true",
        help="usage says how many prompt tokens were cached",
    )
    add(
        "--enable-force-include-usage",
        action="store_true",
        help="streams end with their usage whatever stream_options says",
    )
    add(
        "--return-tokens-as-token-ids",
        action="store_true",
        help='logprobs say "token_id:123" instead of text',
    )
    add(
        "--trust-request-chat-template",
        action="store_true",
        help="requests may bring a chat template of their own",
    )
    add(
        "--metrics-prefix",
        default="jaxserve:",
        help="of metric names; vllm: suits vLLM's dashboards (default: %(default)s)",
    )
    log = parser.add_mutually_exclusive_group()
    log.add_argument(
        "--enable-log-requests",
        dest="log_requests",
        action="store_true",
        default=True,
        help="log a line per request (default)",
    )
    log.add_argument(
        "--disable-log-requests",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        dest="log_requests",
        action="store_false",
        help="do not",
    )
    parser.add_argument(
        "--disable-access-log-for-endpoints",
        dest="unlogged_paths",
        type=_paths,
        default=(),
        metavar="PATHS",
        help="requests for these get no line, e.g. /health,/metrics",
    )
    add_vllm_flags(parser, SERVER_OPTIONS)


def server_settings(args: argparse.Namespace) -> ServerSettings:
    """The ServerSettings of a parsed command line; ConfigError for impossible values."""
    from jaxserve.server.parsing.answer_format import check_parser_names
    from jaxserve.server.plugins.load import load_plugins
    from jaxserve.server.settings import ServerSettings

    # A broken plug-in or an unknown name stops the start before the seconds that loading takes.
    load_plugins(args.tool_parser_plugin, args.reasoning_parser_plugin)
    check_parser_names(args.tool_call_parser, args.reasoning_parser)
    return ServerSettings(
        host=args.host,
        port=args.port,
        uds=args.uds,
        api_keys=tuple(args.api_key or filter(None, [os.environ.get("VLLM_API_KEY")])),
        served_model_names=tuple(args.served_model_name),
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        root_path=args.root_path,
        chat_template=_chat_template(args.chat_template),
        chat_template_content_format=args.chat_template_content_format,
        default_chat_template_kwargs=args.default_chat_template_kwargs,
        enable_auto_tool_choice=args.enable_auto_tool_choice,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        tool_parser_plugin=args.tool_parser_plugin,
        reasoning_parser_plugin=args.reasoning_parser_plugin,
        allowed_origins=args.allowed_origins,
        shutdown_timeout=args.shutdown_timeout,
        max_body_bytes=args.max_body_bytes,
        max_total_body_bytes=args.max_total_body_bytes,
        receive_timeout=args.receive_timeout,
        strict_params=args.strict_params,
        enable_prompt_tokens_details=args.enable_prompt_tokens_details,
        return_tokens_as_token_ids=args.return_tokens_as_token_ids,
        trust_request_chat_template=args.trust_request_chat_template,
        metrics_prefix=args.metrics_prefix,
        unlogged_paths=args.unlogged_paths,
        enable_force_include_usage=args.enable_force_include_usage,
        log_requests=args.log_requests,
    )


def _origins(text: str) -> tuple[str, ...]:
    try:
        origins = json.loads(text) if text.startswith("[") else [text]
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a list of origins, e.g. ["https://chat.example.com"]'
        )
    return tuple(origins)


def _paths(text: str) -> tuple[str, ...]:
    paths = tuple(path.strip() for path in text.split(","))
    if not all(path.startswith("/") for path in paths):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of paths with commas, e.g. /health,/metrics"
        )
    return paths


def _chat_template(given: str | None) -> str | None:
    """The template's text: from a file, from our own, or given itself; else a name that the model may know."""
    if given is None:
        return None
    if any(mark in given for mark in ("{{", "{%", "\n")):
        return _compiled(given, given)
    from jaxserve.server.chat_templates import named_template, template_names

    path = Path(given)
    if not path.exists():
        source = named_template(given)
        if source is not None:
            return source
        if path.suffix != ".jinja" and path.name == given:
            return given  # the model's tokenizer may bring a template of this name, which is known once it is loaded
        raise ConfigError(
            f"--chat-template {given}: no such file, and no template of ours; those are {', '.join(template_names())}"
        )
    try:
        return _compiled(path.read_text(encoding="utf-8"), given)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"--chat-template {given}: {reason}; give a jinja2 file or the template itself"
        ) from error


def _compiled(source: str, given: str) -> str:
    """The source, which is valid jinja2: that it is not would be known after minutes of loading otherwise."""
    from jaxserve.text.chat_template import ChatTemplate

    try:
        ChatTemplate(source)
    except RequestError as error:
        raise ConfigError(f"--chat-template {' '.join(given.split()):.200}: {error}") from error
    return source
