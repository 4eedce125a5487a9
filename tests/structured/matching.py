"""Does a text follow a constraint?  Asked of the byte tokenizer's grammars."""

from __future__ import annotations

import functools
from typing import Any

from jaxserve import StructuredOutputsParams
from jaxserve.structured.compiler import GrammarCompiler
from tests.patience import PATIENCE
from tests.tiny import EOS, IM_END, VOCAB_SIZE, byte_tokenizer

TOKENIZER = byte_tokenizer()


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB_SIZE, (EOS, IM_END))


def check(**constraint: Any) -> None:
    """Raises RequestError for a constraint that is refused."""
    refusal = compiler().check(StructuredOutputsParams(**constraint)).result(PATIENCE)
    if refusal is not None:
        raise refusal


def follows(text: str, **constraint: Any) -> bool:
    """Whether the whole text is an answer; control tokens may be written in it."""
    grammar = compiler().text(StructuredOutputsParams(**constraint))
    compiled = compiler().compile(grammar).result(PATIENCE)
    assert compiled.matcher is not None, compiled.error
    matcher = compiled.matcher.deep_copy()
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    first, rest = token_ids[: len(compiled.forced)], token_ids[len(compiled.forced) :]
    return (
        first == list(compiled.forced)
        and matcher.try_consume_tokens(rest) == len(rest)
        and matcher.is_accepting()
    )
