"""What the handlers of one server share."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, field

from jaxserve import __version__
from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import ConfigError, RequestError
from jaxserve.server.body_budget import BodyBudget
from jaxserve.server.errors import ApiError, unavailable
from jaxserve.server.metrics import ServerMetrics
from jaxserve.server.parsing.answer_format import AnswerFormat, make_answer_format
from jaxserve.server.plugins.load import load_plugins
from jaxserve.server.settings import ServerSettings
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerState:
    """The engine's front end, the settings, the counters, what every answer repeats, and how one is read."""

    llm: AsyncLLM
    settings: ServerSettings
    metrics: ServerMetrics
    model_names: tuple[str, ...]
    system_fingerprint: str
    answer_format: AnswerFormat
    kept_special_tokens: tuple[int, ...]  # those that answer_format must see in the text
    bodies: BodyBudget
    started_at: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    @classmethod
    def build(cls, llm: AsyncLLM, settings: ServerSettings) -> ServerState:
        """State for a server that answers from `llm`.  Raises ConfigError for settings that cannot be."""
        names = settings.served_model_names or (llm.info.model,)
        metrics = ServerMetrics(settings.metrics_prefix, names[0], llm)
        llm.observe(metrics)
        _look_at_templates(llm, settings)
        answer_format = _answer_format(llm.tokenizer, settings)
        kept = answer_format.kept_token_ids(llm.tokenizer)
        bodies = BodyBudget(settings.max_total_body_bytes)
        return cls(llm, settings, metrics, names, _fingerprint(llm), answer_format, kept, bodies)

    def check_model(self, name: str | None) -> str:
        """The name to answer under; no name means the first.  Raises ApiError 404 for a model not served."""
        if not name:
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(f"`{served}`" for served in self.model_names)
            raise ApiError(
                404,
                f"The model `{name:.200}` does not exist. Served here: {served}.",
                param="model",
                code="model_not_found",
            )
        return name

    def check_open(self) -> None:
        """Raise ApiError 503 when nothing can be answered any more."""
        if self.llm.is_dead:
            raise unavailable(f"The engine cannot go on: {self.llm.error}")
        if self.llm.is_draining:
            raise unavailable("The server is shutting down and takes no new requests.")


def check_tokenizer(tokenizer: Tokenizer, settings: ServerSettings) -> None:
    """Raise ConfigError for what a model's tokenizer says cannot be: it is there long before the model is."""
    try:
        for has_tools in (False, True):
            source = tokenizer.template_source(settings.chat_template, has_tools=has_tools)
            if source is not None:
                ChatTemplate(source, tokenizer.special_tokens)  # takes milliseconds
    except RequestError as error:
        raise ConfigError(str(error)) from error
    # Makes the parsers of plug-ins, which may want tokens that are not there.
    _answer_format(tokenizer, settings)


def _answer_format(tokenizer: Tokenizer, settings: ServerSettings) -> AnswerFormat:
    """How the settings say that the model writes.  Raises ConfigError, as for a plug-in that does not fit the model."""
    load_plugins(settings.tool_parser_plugin, settings.reasoning_parser_plugin)
    return make_answer_format(settings.tool_call_parser, settings.reasoning_parser, tokenizer)


def _look_at_templates(llm: AsyncLLM, settings: ServerSettings) -> None:
    """Compile the chat templates that requests will use, and say what they cannot do.  Raises ConfigError."""
    told: set[str] = set()
    for has_tools in (False, True):
        try:
            template = llm.chat_template(
                settings.chat_template, settings.chat_template_content_format, has_tools=has_tools
            )
        except RequestError as error:
            raise ConfigError(str(error)) from error
        if template is not None and template.source not in told and template.traits.shortcomings:
            told.add(template.source)
            _log.warning("the chat template has limits: %s", "; ".join(template.traits.shortcomings))


def _fingerprint(llm: AsyncLLM) -> str:
    """Changes whenever the same request with the same seed may be answered differently."""
    settled = f"{__version__} {llm.info} {llm.defaults}"
    return f"jaxserve-{__version__}-{hashlib.sha256(settled.encode()).hexdigest()[:8]}"
