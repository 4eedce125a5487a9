"""One answer's place in its grammar."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llguidance import LLParserLimits

import jaxserve.structured.compiler as compiling
from jaxserve import StructuredOutputsParams
from jaxserve.structured.compiler import GrammarCompiler
from jaxserve.structured.constraint import ConstraintError, TokenConstraint
from tests.patience import PATIENCE
from tests.structured.matching import TOKENIZER
from tests.tiny import EOS, IM_END, TOOL_CALL, VOCAB_SIZE, byte_tokenizer


def begin(
    compiler: GrammarCompiler, constraint: StructuredOutputsParams, ends: tuple[int, ...] = (EOS,)
) -> TokenConstraint:
    grammar = compiler.text(constraint)
    return TokenConstraint(compiler, grammar, compiler.compile(grammar).result(PATIENCE), ends)


@pytest.fixture
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, VOCAB_SIZE, (EOS, IM_END))


def test_forced_tokens_are_taken_or_sampled(compiler: GrammarCompiler) -> None:
    constraint = begin(compiler, StructuredOutputsParams(regex="abc[de]fg"))
    assert constraint.forced == list(b"abc")
    assert constraint.take_forced(least=4, most=9) == []
    assert constraint.take_forced(least=1, most=2) == list(b"ab")
    with pytest.raises(ConstraintError, match="other than the one"):
        constraint.accept(ord("x"))
    constraint = begin(compiler, StructuredOutputsParams(regex="abc[de]fg"))
    for token_id in b"abcd":
        constraint.accept(token_id)
    assert not constraint.is_complete
    assert constraint.take_forced(least=1, most=9) == list(b"fg")
    assert constraint.is_complete


def test_what_ends_the_answer_is_never_taken(compiler: GrammarCompiler) -> None:
    marked = StructuredOutputsParams(grammar='start: <tool_call> "ab" <|im_end|>')
    assert begin(compiler, marked).take_forced(1, 9) == [TOOL_CALL, *b"ab"]
    assert begin(compiler, marked, (EOS, ord("b"))).take_forced(1, 9) == [TOOL_CALL, ord("a")]
    # Without end tokens the answer's last token ends it.
    assert begin(compiler, StructuredOutputsParams(regex="abc"), ()).take_forced(1, 9) == list(b"ab")


def test_what_every_answer_begins_with_is_found_when_the_grammar_is_compiled(
    compiler: GrammarCompiler,
) -> None:
    compiled = compiler.compile(compiler.text(StructuredOutputsParams(regex="abc[de]"))).result(PATIENCE)
    assert compiled.forced == tuple(b"abc")


def test_very_many_forced_tokens_are_taken_piece_by_piece(compiler: GrammarCompiler) -> None:
    constraint = begin(compiler, StructuredOutputsParams(regex="a{9000}"))
    assert len(constraint.forced) < 9000  # each of many answers would keep them all
    num_tokens = 0
    while not constraint.is_complete:
        num_tokens += len(constraint.take_forced(least=1, most=10_000))
        if not constraint.is_complete:
            constraint.accept(ord("a"))
            num_tokens += 1
    assert num_tokens == 9000


def test_a_token_that_is_not_allowed_is_an_error(compiler: GrammarCompiler) -> None:
    constraint = begin(compiler, StructuredOutputsParams(regex="[ab]{3}"))
    with pytest.raises(ConstraintError, match="cannot be followed"):
        constraint.accept(ord("c"))


def test_answers_that_share_a_grammar_do_not_share_its_limits(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = LLParserLimits(max_lexer_states=400, verbose_errors=False)
    monkeypatch.setattr(compiling, "parser_limits", lambda: limits)
    # One state of its automaton for every answer of twenty letters.
    many = StructuredOutputsParams(regex="([ab]*a[ab]{20}c)*")
    rng = random.Random(1)

    def answer(length: int) -> None:
        constraint = begin(compiler, many)
        for token_id in rng.choices(b"ab", k=length):
            constraint.matcher.compute_bitmask()
            if constraint.matcher.is_error():
                constraint.recover()
            constraint.accept(token_id)

    for _ in range(6):  # together they need more states than there may be, each alone does not
        answer(100)
    with pytest.raises(ConstraintError, match="cannot be followed"):
        answer(1000)
    answer(100)


def test_long_forced_texts_are_tokenized_once_for_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With n answers to one request the step loop would wait for each."""
    tokenizer = byte_tokenizer()
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, (EOS, IM_END))
    constraint = StructuredOutputsParams(regex="[xy]a{5000}")
    begin(compiler, constraint)
    lengths: list[int] = []
    encode = tokenizer.encode

    def noting(text: str, *args: Any, **kwargs: Any) -> list[int]:
        lengths.append(len(text))
        return encode(text, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", noting)
    answers = [begin(compiler, constraint) for _ in range(8)]
    for answer in answers:
        answer.accept(ord("x"))
        assert set(answer.forced) == {ord("a")}
    assert len(lengths) < 2, "the compiler has looked that far itself"


def test_long_forced_texts_come_in_pieces_with_what_stands_behind_them(compiler: GrammarCompiler) -> None:
    for text in ("é" + "ab" * 2500, "a" * 1000):  # longer than what is looked at, and shorter
        grammar = f'start: ("x" | "y") {json.dumps(text, ensure_ascii=False)} <tool_call> "z" ("p" | "q")'
        constraint = begin(compiler, StructuredOutputsParams(grammar=grammar))
        constraint.accept(ord("x"))
        told: list[int] = []
        while constraint.forced:
            told += constraint.take_forced(1, 10_000)
            assert len(told) <= len(text.encode()) + 2
            if not constraint.forced and len(told) < len(text.encode()) + 2:
                mask = int.from_bytes(constraint.matcher.compute_bitmask(), "little")
                told.append(mask.bit_length() - 1)
                assert mask == 1 << told[-1], "one token is left"
                constraint.accept(told[-1])
        assert told == [*text.encode(), TOOL_CALL, ord("z")]
        constraint.accept(ord("p"))
        assert constraint.is_complete
