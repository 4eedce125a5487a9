"""ReasoningParser and ReasoningParserManager: what reasoning-parser plug-ins derive from and register with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

from jaxserve.server.parser_api.class_registry import ParserManager, ParserRegistry
from jaxserve.server.parser_api.protocol import DeltaMessage
from jaxserve.server.parser_api.requests import ChatCompletionRequest

# The methods' names before vLLM 0.12, and since.
_RENAMED = {
    "extract_reasoning_content": "extract_reasoning",
    "extract_reasoning_content_streaming": "extract_reasoning_streaming",
}


class ReasoningParser:
    """Tells what a model thought from what it says.  One object sees one answer.

    A method that a class defines under its old or its new name can be called by both.
    """

    engine_based_streaming: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED.items():
            for given, other in ((old, new), (new, old)):
                if given in vars(cls) and other not in vars(cls):
                    setattr(cls, other, vars(cls)[given])

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        self.model_tokenizer = tokenizer

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self.model_tokenizer.get_vocab()

    @property
    def reasoning_start_str(self) -> str | None:
        """The text that begins reasoning, where there is one."""
        return None

    @property
    def reasoning_end_str(self) -> str | None:
        """The text that ends reasoning, where there is one."""
        return None

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether reasoning is over after these tokens, of a prompt or of an answer."""
        raise NotImplementedError(f"{type(self).__name__} does not implement is_reasoning_end")

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether reasoning ends with `delta_ids`, the last tokens of `input_ids`."""
        return self.is_reasoning_end(input_ids)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the end of reasoning."""
        raise NotImplementedError(f"{type(self).__name__} does not implement extract_content_ids")

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many tokens of an answer are reasoning; 0 where a parser cannot tell."""
        return 0

    def extract_reasoning(
        self, model_output: str, request: ChatCompletionRequest
    ) -> tuple[str | None, str | None]:
        """The reasoning and the rest of a whole answer."""
        raise NotImplementedError(f"{type(self).__name__} does not implement extract_reasoning")

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What is new in an answer with one more piece (current = previous + delta); None: nothing yet."""
        raise NotImplementedError(f"{type(self).__name__} does not implement extract_reasoning_streaming")

    extract_reasoning_content = extract_reasoning
    extract_reasoning_content_streaming = extract_reasoning_streaming

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """The request as this parser needs it."""
        return request

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        """Called with the prompt before the answer begins."""

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Called once with a prompt that does not end reasoning itself."""

    def prepare_structured_tag(self, original_tag: str | None, tool_server: Any) -> str | None:
        """The structural tag that the answer is to follow."""
        return original_tag


def _builtin(name: str) -> type | None:
    # Derives from this module's class.
    from jaxserve.server.reasoning_parsers.declared import builtin_reasoning_parser

    return builtin_reasoning_parser(name)


def _builtin_names() -> list[str]:
    from jaxserve.server.reasoning_parsers.declared import builtin_reasoning_parsers

    return builtin_reasoning_parsers()


class ReasoningParserManager(ParserManager):
    """The registry of reasoning parsers."""

    registry: ClassVar = ParserRegistry("reasoning parser", ReasoningParser, _builtin, _builtin_names)
    reasoning_parsers: ClassVar[dict[str, type[ReasoningParser]]] = registry.classes
    lazy_parsers: ClassVar[dict[str, tuple[str, str]]] = registry.lazy

    @classmethod
    def get_reasoning_parser(cls, name: str) -> type[ReasoningParser]:
        """The class registered under a name.  Raises KeyError if there is none."""
        return cls.registry.get(name)

    @classmethod
    def import_reasoning_parser(cls, plugin_path: str) -> None:
        """Import a plug-in file, which registers its parsers.  Raises ConfigError if it cannot be imported."""
        from jaxserve.server.plugins.load import load_plugin  # serves this module to plug-ins

        load_plugin(plugin_path)
