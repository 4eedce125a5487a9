"""Tokens to outputs: text, stop strings, logprobs and n, whatever the chunks they come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.admission import Admission
from jaxserve.engine.protocol import TokenOutput
from jaxserve.errors import RequestError, RequestFailedError
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.output_processor import OutputProcessor
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.request_state import RequestState
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.scripted import scripted_info, scripted_logprobs
from tests.tiny import BOS, EOS, IM_END, VOCAB_SIZE, byte_tokenizer

TOKENIZER = byte_tokenizer()


def final(**changes: object) -> SamplingParams:
    return SamplingParams(output_kind=OutputKind.FINAL_ONLY, **changes)  # pyright: ignore[reportArgumentType]  # checked there


def delta(**changes: object) -> SamplingParams:
    return SamplingParams(output_kind=OutputKind.DELTA, **changes)  # pyright: ignore[reportArgumentType]  # checked there


def admit(params: SamplingParams, prompt: str = "Hi", request_id: str = "r") -> RequestState:
    # An admission of its own, so that its core requests are numbered from 0.
    admission = Admission(scripted_info(), TOKENIZER, GenerationDefaults(eos_token_ids=(EOS,)))
    return admission.admit(request_id, prompt, params)


def token_output(
    request_id: str, token_ids: Sequence[int], params: SamplingParams, finish_reason: str | None = None
) -> TokenOutput:
    logprobs = None
    if params.logprobs is not None:
        logprobs = [scripted_logprobs(i, params.logprobs, VOCAB_SIZE) for i in token_ids]
    return TokenOutput(
        request_id=request_id, token_ids=list(token_ids), logprobs=logprobs, finish_reason=finish_reason
    )


def chunks(token_ids: Sequence[int], sizes: Iterable[int]) -> list[Sequence[int]]:
    """Cut token ids into runs of the given sizes, cycling over them."""
    sizes = list(sizes)
    parts, at = [], 0
    while at < len(token_ids):
        size = sizes[len(parts) % len(sizes)]
        parts.append(token_ids[at : at + size])
        at += size
    return parts


def feed(
    params: SamplingParams,
    token_ids: Sequence[int],
    finish_reason: str = "length",
    sizes: Iterable[int] = (1,),
) -> tuple[list[RequestOutput], list[str]]:
    """All outputs of one request (n=1) that is given these tokens, and what the engine was told to abort."""
    processor = OutputProcessor()
    request = admit(params)
    processor.add(request)
    outputs, aborts = [], []
    parts = chunks(token_ids, sizes)
    for i, part in enumerate(parts):
        reason = finish_reason if i == len(parts) - 1 else None
        changed, to_abort = processor.process([token_output("r#0", part, params, reason)])
        aborts += to_abort
        outputs += [output for state in changed if (output := state.take()) is not None]
    assert len(processor) == processor.num_sequences == 0
    return outputs, aborts


def join(outputs: Iterable[RequestOutput], index: int = 0) -> CompletionOutput:
    """The deltas of one answer put together again."""
    deltas = [answer for output in outputs for answer in output.outputs if answer.index == index]
    logprobs = [entry for delta in deltas if delta.logprobs is not None for entry in delta.logprobs]
    return CompletionOutput(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=[i for delta in deltas for i in delta.token_ids],
        logprobs=logprobs if deltas[-1].logprobs is not None else None,
        cumulative_logprob=deltas[-1].cumulative_logprob,
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
    )


def text_of(token_ids: Sequence[int]) -> str:
    return TOKENIZER.decode(token_ids)


class TestText:
    def test_the_end_token_is_in_the_ids_and_not_in_the_text(self):
        (output,), _ = feed(final(), [*b"Paris", EOS], "stop", [99])
        assert output.finished
        assert output.outputs[0].text == "Paris"
        assert output.outputs[0].token_ids == [*b"Paris", EOS]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)

    def test_the_end_token_stays_silent_even_when_special_tokens_are_shown(self):
        (output,), _ = feed(final(skip_special_tokens=False), [*b"a", BOS, *b"b", EOS], "stop")
        assert output.outputs[0].text == "a<|bos|>b"

    @pytest.mark.parametrize(("include", "text"), [(False, "wait"), (True, "wait!")])
    def test_a_stop_token_shows_when_asked_for(self, include: bool, text: str):
        params = final(stop_token_ids=(ord("!"),), include_stop_str_in_output=include)
        processor, request = OutputProcessor(), admit(params)
        processor.add(request)
        processor.process(
            [
                TokenOutput(
                    request_id="r#0", token_ids=[*b"wait!"], finish_reason="stop", stop_token_id=ord("!")
                )
            ]
        )
        output = request.take()
        assert output is not None
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == (text, ord("!"))

    def test_a_length_finish_keeps_its_last_token(self):
        (output,), _ = feed(final(), [*b"abc"], "length")
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("abc", "length")

    def test_without_detokenizing_every_token_is_a_delta(self):
        outputs, _ = feed(delta(detokenize=False), [*b"abc", EOS], "stop")
        assert [output.outputs[0].token_ids for output in outputs] == [[97], [98], [99], [EOS]]
        assert all(output.outputs[0].text == "" for output in outputs)

    def test_half_a_character_waits_with_its_tokens(self):
        outputs, _ = feed(delta(), [*"né".encode(), EOS], "stop")
        assert [(o.outputs[0].text, o.outputs[0].token_ids) for o in outputs] == [
            ("n", [0x6E]),
            ("é", [0xC3, 0xA9]),
            ("", [EOS]),
        ]


class TestStopStrings:
    @pytest.mark.parametrize("size", [1, 2, 3, 8])
    def test_across_tokens_and_chunks(self, size: int):
        params = final(stop=("4, 5",))
        (output,), aborts = feed(params, b"3, 4, 5, 6", sizes=[size])
        assert output.outputs[0].text == "3, "
        assert output.outputs[0].token_ids == [*b"3, 4, 5"]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "4, 5")
        assert aborts == ["r#0"]

    def test_included(self):
        params = final(stop=("5",), include_stop_str_in_output=True)
        (output,), _ = feed(params, b"4, 5, 6", sizes=[3])
        assert output.outputs[0].text == "4, 5"

    def test_an_answer_the_engine_has_ended_is_not_aborted(self):
        (output,), aborts = feed(final(stop=("c",)), [*b"abc"], "length")
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "c")
        assert aborts == []

    def test_what_only_began_a_stop_string_is_told_at_the_end(self):
        outputs, _ = feed(delta(stop=("\n\nUser:",)), [*b"ok\n\nUse", EOS], "stop")
        assert [output.outputs[0].text for output in outputs] == ["o", "k", "\n\nUse"]
        assert outputs[-1].outputs[0].token_ids == [*b"\n\nUse", EOS]

    def test_is_not_looked_for_within_the_first_min_tokens(self):
        (output,), _ = feed(final(stop=("a",), min_tokens=4, max_tokens=9), b"banana", sizes=[1])
        assert output.outputs[0].text == "banan"
        assert output.outputs[0].token_ids == [*b"banana"]

    def test_logprobs_end_with_the_tokens(self):
        (output,), _ = feed(final(stop=("b",), logprobs=1), b"aabbcc", sizes=[6])
        answer = output.outputs[0]
        assert answer.logprobs is not None
        assert [next(iter(entry)) for entry in answer.logprobs] == answer.token_ids == [*b"aab"]
        assert answer.cumulative_logprob == pytest.approx(-1.0 - 1.0 - 0.5)


class TestKinds:
    def test_cumulative_holds_everything_so_far(self):
        outputs, _ = feed(SamplingParams(logprobs=0), [*b"abc", EOS], "stop")
        assert [output.outputs[0].text for output in outputs] == ["a", "ab", "abc", "abc"]
        assert [len(output.outputs[0].logprobs or []) for output in outputs] == [1, 2, 3, 4]
        assert [output.finished for output in outputs] == [False, False, False, True]

    def test_deltas_that_wait_become_one(self):
        params = delta(logprobs=1)
        request = admit(params)
        for token_id in b"abc":
            request.push(0, token_output("r#0", [token_id], params))
        output = request.take()
        assert output is not None
        assert output.outputs[0].text == "abc"
        assert len(output.outputs[0].logprobs or []) == 3
        assert request.take() is None

    def test_abort_tells_the_text_held_back(self):
        params = delta(stop=("xyz",))
        request = admit(params)
        request.push(0, token_output("r#0", [*b"wxy"], params))
        assert (first := request.take()) is not None
        request.abort()
        last = request.take()
        assert last is not None
        assert (first.outputs[0].text, last.outputs[0].text) == ("w", "xy")
        assert (last.outputs[0].finish_reason, last.finished) == ("abort", True)
        assert request.take() is None

    @settings(max_examples=60)
    @given(
        text=st.text(alphabet="ab é🎉\n", max_size=24),
        cut=st.integers(0, 3),
        ending=st.sampled_from(["stop", "length"]),
        stop=st.sampled_from([(), ("ab",), ("a\n", "é"), ("🎉b",)]),
        include=st.booleans(),
        specials=st.booleans(),
        logprobs=st.sampled_from([None, 0, 2]),
        sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    )
    def test_joined_deltas_are_the_whole_answer(
        self,
        text: str,
        cut: int,
        ending: str,
        stop: tuple[str, ...],
        include: bool,
        specials: bool,
        logprobs: int | None,
        sizes: list[int],
    ):
        token_ids = [*text.encode()]
        token_ids = [
            *token_ids[: max(0, len(token_ids) - cut)],
            IM_END,
            EOS if ending == "stop" else ord("z"),
        ]
        params = SamplingParams(
            stop=stop,
            include_stop_str_in_output=include,
            skip_special_tokens=specials,
            logprobs=logprobs,
            max_tokens=None,
        )
        whole, _ = feed(replace(params, output_kind=OutputKind.FINAL_ONLY), token_ids, ending, [99])
        cumulative, _ = feed(params, token_ids, ending, sizes)
        deltas, _ = feed(replace(params, output_kind=OutputKind.DELTA), token_ids, ending, sizes)
        assert join(deltas) == whole[0].outputs[0] == cumulative[-1].outputs[0]
        assert all(o.outputs[0].text or o.finished for o in deltas)
        assert [o.finished for o in deltas] == [False] * (len(deltas) - 1) + [True]

    @settings(max_examples=60)
    @given(text=st.text(alphabet="abc", max_size=30), stop=st.text(alphabet="abc", min_size=1, max_size=4))
    def test_a_stop_string_cuts_where_a_plain_search_finds_it(self, text: str, stop: str):
        outputs, _ = feed(delta(stop=(stop,)), text.encode() + b"!", sizes=[1])
        answer, at = join(outputs), text.find(stop)
        if at < 0:
            assert (answer.text, answer.finish_reason) == (text + "!", "length")
        else:
            assert (answer.text, answer.stop_reason) == (text[:at], stop)
            assert text_of(answer.token_ids) == text[: at + len(stop)]


class TestLogprobs:
    def test_the_sampled_token_comes_first(self):
        (output,), _ = feed(final(logprobs=2), [*b"a", EOS], "stop")  # "a" is 97, odd: the second likeliest
        assert output.outputs[0].logprobs is not None
        entry = output.outputs[0].logprobs[0]
        assert [(i, p.rank, p.decoded_token) for i, p in entry.items()] == [(97, 2, "a"), (98, 1, "b")]
        assert next(iter(output.outputs[0].logprobs[1].values())).decoded_token == "<|eos|>"

    def test_texts_of_sampled_tokens_join_to_the_answer(self):
        text = "né 🎉!"
        (output,), _ = feed(final(logprobs=0), [*text.encode()], "length")
        assert output.outputs[0].logprobs is not None
        texts = [next(iter(entry.values())).decoded_token for entry in output.outputs[0].logprobs]
        assert texts == ["n", "", "é", " ", "", "", "", "🎉", "!"]

    def test_prompt_logprobs_come_once_in_deltas_and_start_with_none(self):
        params = delta(prompt_logprobs=1)
        request = admit(params, prompt="abc")
        positions = [scripted_logprobs(i, 1, VOCAB_SIZE) for i in b"bc"]
        request.push(0, replace(token_output("r#0", [*b"x"], params), prompt_logprobs=positions))
        first = request.take()
        request.push(0, token_output("r#0", [*b"y"], params))
        second = request.take()
        assert first is not None
        assert second is not None
        assert first.prompt_logprobs is not None
        assert first.prompt_logprobs[0] is None
        assert [list(entry or {}) for entry in first.prompt_logprobs[1:]] == [[98], [99, 100]]
        assert second.prompt_logprobs is None


class TestFanOut:
    def test_answers_keep_their_places(self):
        params = final(n=3)
        processor, request = OutputProcessor(), admit(params)
        processor.add(request)
        assert [core.request_id for core in request.core_requests] == ["r-0#0", "r-1#1", "r-2#2"]
        for core_id, text in (("r-2#2", b"two"), ("r-0#0", b"zero")):
            changed, _ = processor.process([token_output(core_id, [*text], params, "length")])
            assert changed == [request]
            assert request.take() is None
        processor.process([token_output("r-1#1", [*b"one"], params, "length")])
        output = request.take()
        assert output is not None
        assert [(answer.index, answer.text) for answer in output.outputs] == [
            (0, "zero"),
            (1, "one"),
            (2, "two"),
        ]

    def test_deltas_name_only_the_answers_with_news(self):
        params = delta(n=2)
        processor, request = OutputProcessor(), admit(params)
        processor.add(request)
        processor.process([token_output("r-1#1", [*b"x"], params, "length")])
        output = request.take()
        assert output is not None
        assert [answer.index for answer in output.outputs] == [1]
        assert not output.finished
        processor.process([token_output("r-0#0", [*b"y"], params, "length")])
        output = request.take()
        assert output is not None
        assert [answer.index for answer in output.outputs] == [0]
        assert output.finished

    def test_a_failure_fails_the_request_and_stops_its_siblings(self):
        params = final(n=3)
        processor, request, other = OutputProcessor(), admit(params), admit(final(), request_id="other")
        processor.add(request)
        processor.add(other)
        _, aborts = processor.process([TokenOutput(request_id="r-1#1", token_ids=[], error="out of luck")])
        assert aborts == ["r-0#0", "r-2#2"]
        with pytest.raises(RequestFailedError, match="out of luck"):
            request.take()
        assert processor.requests == [other]

    def test_late_outputs_are_dropped(self):
        params = final()
        processor, request = OutputProcessor(), admit(params)
        processor.add(request)
        assert processor.drop("r") == ["r#0"]
        assert processor.process([token_output("r#0", [97], params)]) == ([], [])
        assert processor.drop("r") == []

    def test_an_id_in_use_is_refused(self):
        processor = OutputProcessor()
        processor.add(admit(final(n=2), request_id="a"))
        with pytest.raises(RequestError, match="'a' is in use"):
            processor.add(admit(final(), request_id="a"))
        processor.add(admit(final(), request_id="a-1"))


@pytest.mark.parametrize("param", ["structured_outputs", "response_format", "tools"])
def test_a_constraint_at_fault_is_told_of_the_field_that_was_sent(param: str) -> None:
    state = admit(final(structured_outputs=StructuredOutputsParams(regex="a", param=param)))
    processor = OutputProcessor()
    processor.add(state)
    failed = TokenOutput(request_id="r#0", token_ids=[], error="stuck", error_param="structured_outputs")
    processor.process([failed])
    assert isinstance(state.error, RequestError)
    assert state.error.param == param
