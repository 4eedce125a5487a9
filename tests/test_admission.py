"""The door: what is refused, by which name, and what the engine gets for what is let in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.admission import Admission, bad_word_ids
from jaxserve.errors import RequestError
from jaxserve.inputs import TokenizedPrompt, prompt_list
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.sampling_params import SamplingParams
from tests.scripted import scripted_info
from tests.tiny import BOS, EOS, IM_END, byte_tokenizer

DEFAULTS = GenerationDefaults(eos_token_ids=(IM_END,), sampling={"temperature": 0.5, "top_k": 7})


def door(*, add_bos: bool = False, seed: int | None = None) -> Admission:
    return Admission(scripted_info(max_model_len=10), byte_tokenizer(add_bos=add_bos), DEFAULTS, seed)


def core_params(admission: Admission, prompt: Any = "abc", **params: Any) -> list[SamplingParams]:
    return [core.params for core in admission.admit("r", prompt, SamplingParams(**params)).core_requests]


@pytest.mark.parametrize(
    ("prompt", "token_ids", "text"),
    [
        ("ab", [BOS, 97, 98], "ab"),
        ({"prompt": "ab"}, [BOS, 97, 98], "ab"),
        ([97, 98], [97, 98], None),
        ((97, 98), [97, 98], None),
        ({"prompt_token_ids": [97]}, [97], None),
        ({"prompt_token_ids": [97], "prompt": "a"}, [97], "a"),
        (TokenizedPrompt([97], "a"), [97], "a"),
    ],
)
def test_prompts_of_every_shape(prompt: Any, token_ids: list[int], text: str | None):
    state = door(add_bos=True).admit("r", prompt, SamplingParams())
    state.abort()
    output = state.take()
    assert output is not None
    assert (output.prompt_token_ids, output.prompt) == (token_ids, text)
    assert state.core_requests[0].prompt_token_ids == token_ids


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "empty"),
        ([97, 262], r"vocabulary of 262: \[262\]"),
        ([-1], r"\[-1\]"),
        ("0123456789", "at most 9"),
        ([97] * 11, "10 tokens.* 11"),
        (7, "got int"),
        (None, "got NoneType"),
        ([1.5], "integers, got 1.5"),
        ([True], "integers, got True"),
        (["a"], "integers, got 'a'"),
        ({}, "needs 'prompt'"),
        ({"prompt": 3}, "text, got int"),
        ({"prompt": "a", "multi_modal_uuids": {}}, "multi_modal_uuids"),
        ("\ud800", "surrogates"),
    ],
)
def test_wrong_prompts_are_refused_by_name(prompt: Any, says: str):
    with pytest.raises(RequestError, match=says) as caught:
        door().admit("r", prompt, SamplingParams())
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logit_bias": {262: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [300]}, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"n": 100_000}, "n"),
    ],
)
def test_params_beyond_the_model_are_refused_by_name(params: dict[str, Any], param: str):
    with pytest.raises(RequestError) as caught:
        door().admit("r", "abc", SamplingParams(**params))
    assert caught.value.param == param


def test_max_tokens_fits_the_context():
    assert core_params(door(), max_tokens=100, min_tokens=50)[0].max_tokens == 7
    assert core_params(door(), max_tokens=100, min_tokens=50)[0].min_tokens == 7
    assert core_params(door(), max_tokens=None)[0].max_tokens == 7
    assert core_params(door(), max_tokens=2)[0].max_tokens == 2


def test_each_answer_has_a_seed_of_its_own():
    assert [p.seed for p in core_params(door(), n=3, seed=5)] == [5, 6, 7]
    assert [p.seed for p in core_params(door(), n=2, seed=2**64 - 1)] == [2**64 - 1, 0]
    drawn = core_params(door(), n=2)
    assert drawn[0].seed is not None
    assert drawn[1].seed == drawn[0].seed + 1


def test_what_many_answers_share_is_checked_once():
    class Counted(dict[int, float]):
        num_reads = 0

        def items(self) -> Any:
            self.num_reads += 1
            return super().items()

    bias = Counted({3: 1.0})
    params = core_params(door(), n=500, seed=7, logit_bias=bias)
    assert bias.num_reads < 10, "the event loop would stand still for long lists"
    assert [one.seed for one in params] == list(range(7, 507))
    assert all(one == replace(params[0], seed=one.seed) for one in params)


def test_the_engines_seed_makes_drawn_seeds_repeat():
    one, two = door(seed=3), door(seed=3)
    first = [core_params(one)[0].seed for _ in range(3)]
    assert first == [core_params(two)[0].seed for _ in range(3)]
    assert len(set(first)) == 3


def test_only_the_first_answer_computes_prompt_logprobs():
    assert [p.prompt_logprobs for p in core_params(door(), n=3, prompt_logprobs=1)] == [1, None, None]


def test_end_tokens_come_from_model_and_tokenizer():
    admit = door().admit
    core = admit("r", "a", SamplingParams(stop_token_ids=[9, 9])).core_requests[0]
    assert (core.eos_token_ids, core.stop_token_ids) == ((EOS,), (9, IM_END))
    core = admit("r", "a", SamplingParams(ignore_eos=True, stop_token_ids=[9])).core_requests[0]
    assert (core.eos_token_ids, core.stop_token_ids) == ((), (9,))


def test_tokens_that_the_model_does_not_have_never_reach_the_engine():
    admission = Admission(replace(scripted_info(), vocab_size=IM_END), byte_tokenizer(), DEFAULTS)
    core = admission.admit("r", "a", SamplingParams(bad_words=("no", "<|im_end|>"))).core_requests[0]
    assert (core.eos_token_ids, core.stop_token_ids) == ((EOS,), ())
    assert core.bad_word_ids == ((*b"no",), (*b" no",))


def test_bad_words_are_banned_at_the_start_and_after_a_space():
    tokenizer = byte_tokenizer()
    assert bad_word_ids(["no"], tokenizer) == ((*b"no",), (*b" no",))
    assert bad_word_ids([" no", "no"], tokenizer) == ((*b"no",), (*b" no",))
    assert bad_word_ids([" "], tokenizer) == ((*b" ",),)


def test_texts_do_not_travel_to_the_engine():
    params = core_params(door(), stop=["x"], bad_words=["y"])[0]
    assert (params.stop, params.bad_words) == ((), ())


def test_defaults_are_the_models_own():
    params = door().default_sampling_params(top_k=3)
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 3, 1.0)


@pytest.mark.parametrize(
    ("prompts", "is_one"),
    [("a", True), ([1, 2], True), ({"prompt": "a"}, True), (["a"], False), ([[1]], False), ([], False)],
)
def test_one_prompt_or_many(prompts: Any, is_one: bool):
    assert prompt_list(prompts) == ([prompts] if is_one else prompts)
