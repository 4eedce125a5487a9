"""SamplingParams: what is refused, and by which name."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1.0),
        ("n", True),
        ("n", None),
        ("top_k", 2.5),
        ("seed", 1.5),
        ("seed", 2**64),
        ("max_tokens", "16"),
        ("min_tokens", None),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("stop_token_ids", ["7"]),
        ("allowed_token_ids", [1.0]),
        ("logit_bias", {"7": 1.0}),
        ("temperature", float("nan")),
        ("stop", [""]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_lists_and_single_strings_become_tuples() -> None:
    # As users of vLLM write them: the type checker, which reads the tests too, has nothing to say.
    params = SamplingParams(stop="a", stop_token_ids=[1, 2], bad_words=None, allowed_token_ids=[3])
    assert (params.stop, params.stop_token_ids, params.bad_words, params.allowed_token_ids) == (
        ("a",),
        (1, 2),
        (),
        (3,),
    )


def test_every_sequence_does() -> None:
    params = SamplingParams(
        stop=["a", "b"], stop_token_ids=range(2), bad_words="no", allowed_token_ids=(3,), logit_bias={1: 2}
    )
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (0, 1))
    assert (params.bad_words, params.allowed_token_ids) == (("no",), (3,))
    assert SamplingParams(stop=None, stop_token_ids=None).stop_token_ids == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 5),
        ("stop", b"end"),
        ("bad_words", {"no": 1}),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 7),
        ("allowed_token_ids", 7),
        ("allowed_token_ids", []),
        ("ignore_eos", None),
        ("skip_special_tokens", 1),
        ("output_kind", 2),
    ],
)
def test_wrong_types_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
