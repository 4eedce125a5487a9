"""What is told arrives as it was, whatever a plan or a request holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.hosts.messages import Admit, Dispatch, End, Finish, Hello, Start, decode, encode
from jaxserve.engine.plan import ON_DEVICE, Admission, PlanEntry, StepPlan
from jaxserve.engine.protocol import CoreRequest, ImageInput
from jaxserve.sampling_params import SamplingParams
from tests.engine.tiny_engine import request

PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 2**63 - 1},
    {"logit_bias": {3: -100.0, 99: 1.5}, "presence_penalty": -1.0, "repetition_penalty": 1.2},
    {"allowed_token_ids": [1, 2, 3], "min_tokens": 2, "logprobs": 4, "prompt_logprobs": 0},
]

ENTRIES = st.builds(
    PlanEntry,
    seq_id=st.integers(0, 2**40),
    slot=st.integers(0, 300),
    start=st.integers(0, 2**20),
    token_ids=st.lists(st.integers(ON_DEVICE, 200_000), max_size=4).map(tuple),
    samples=st.booleans(),
    num_generated=st.integers(0, 9),
    page_offset=st.integers(0, 9),
    new_pages=st.lists(st.integers(1, 99), max_size=3).map(tuple),
    num_steps=st.integers(1, 8),
    tail_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    prompt_targets=st.lists(st.integers(0, 99), max_size=3).map(tuple),
)


def admissions() -> list[Admission]:
    requests = [request(f"r{i}", range(i + 1), **params) for i, params in enumerate(PARAMS)]
    requests.append(replace(requests[0], grammar="start: /a+/", bad_word_ids=((1, 2), (3,)), cache_salt="ä"))
    image = ImageInput(
        pixels=b"\0\xff" * 6, grid_thw=(1, 2, 2), content_hash="c0ffee", offset=1, num_tokens=1
    )
    requests.append(replace(requests[0], images=(image,)))
    return [Admission(slot=i, request=one, token_ids=(1, 2, i)) for i, one in enumerate(requests)]


@pytest.mark.parametrize("admission", admissions())
def test_admissions(admission: Admission) -> None:
    assert decode(encode(Admit(admission))) == Admit(admission)
    found = decode(encode(Admit(admission)))
    assert isinstance(found, Admit)
    assert isinstance(found.admission.request, CoreRequest)
    assert isinstance(found.admission.request.params, SamplingParams)


@given(st.lists(ENTRIES, max_size=3), st.integers(1, 8))
def test_plans(entries: list[PlanEntry], num_steps: int) -> None:
    plan = StepPlan(admissions=tuple(admissions()[:1]), entries=tuple(entries), num_steps=num_steps)
    for kind in (Dispatch, Start):
        assert decode(encode(kind(plan))) == kind(plan)
    masks = {row: np.array([row, 2**32 - 1], np.uint32) for row in range(len(entries))}
    found = decode(encode(Finish.of(plan, masks)))
    assert isinstance(found, Finish)
    assert found.plan == plan
    assert found.allowed.keys() == masks.keys()
    for row, mask in masks.items():
        assert found.allowed[row].dtype == mask.dtype
        assert (found.allowed[row] == mask).all()


def test_what_is_no_message_is_refused() -> None:
    for data in (b"", b"\xc1", encode(Hello(1, 2))[:-1], msgspec.msgpack.encode({"type": "Shell"})):
        with pytest.raises(ValueError, match=r"."):
            decode(data)
    assert decode(encode(End("because"))) == End("because")
