"""Options of vLLM's HTTP server that are not here, as vllm_options has those of its engine."""

from __future__ import annotations

from jaxserve.vllm_options import VllmOption, needless, needless_switch, refused, refused_switch

_PROXY = "leave that to the proxy in front"
_PROCESSES = "the engine and its HTTP front end run in one process; leave it out"
_CORS = 'any are allowed, to the origins of --allowed-origins; leave it out (or give ["*"])'
_LOG = "the log goes to stderr: our own lines from INFO on, those of libraries from WARNING on"

SERVER_OPTIONS: tuple[VllmOption, ...] = (
    refused("--api-server-count -asc", "one process serves HTTP; leave it out (or give 1)", "1"),
    refused_switch("--headless", _PROCESSES),
    refused_switch("--grpc", "HTTP is spoken; leave it out"),
    refused("--middleware", _PROXY),
    refused("--ssl-ca-certs --ssl-ciphers", _PROXY),
    refused("--ssl-cert-reqs", _PROXY, "0"),
    refused_switch("--enable-ssl-refresh", "start the server again when its certificate changes"),
    refused_switch("--allow-credentials", "browsers send API keys without; leave it out"),
    refused("--allowed-methods --allowed-headers", _CORS, '["*"]', "*"),
    refused("--response-role", "answers are the assistant's; leave it out", "assistant"),
    refused_switch(
        "--exclude-tools-when-tool-choice-none",
        "send no tools with a request that is to call none; leave it out",
    ),
    refused("--tool-server", "tools are the client's to run"),
    refused("--log-config-file", _LOG),
    refused_switch("--enable-log-outputs", "answers are not logged; leave it out"),
    refused_switch("--enable-per-request-metrics", "/metrics has histograms of all requests; leave it out"),
    refused_switch("--enable-tokenizer-info-endpoint", "there is /tokenize; leave it out"),
    refused_switch("--tokens-only", "/v1/completions takes token ids, and return_token_ids gives them back"),
    refused("--fingerprint-mode --fingerprint-value", "fingerprints tell of version and settings", "full"),
    refused_switch("--enable-offline-docs", "there is no page that describes the API; leave it out"),
    needless("--uvicorn-log-level", _LOG, "info"),
    needless("--max-log-len", "prompts are not logged"),
    needless_switch("--log-error-stack", "the log has the stacks of errors that nobody expected", "true"),
    needless_switch("--enable-log-deltas", "answers are not logged"),
    needless_switch("--enable-server-load-tracking", "/load counts requests", "true"),
    needless_switch("--enable-request-id-headers", "every answer has X-Request-Id", "true"),
    needless_switch("--disable-fastapi-docs", "there are no such pages", "true"),
    needless_switch(
        "--disable-frontend-multiprocessing", "the HTTP front end runs in the engine's process", "true"
    ),
    needless_switch("--enable-reasoning", "--reasoning-parser alone says so"),
    needless(
        "--h11-max-incomplete-event-size --h11-max-header-count", "heads of requests have limits of our own"
    ),
)
