"""Which sampler a batch needs."""

from __future__ import annotations

from functools import reduce
from itertools import product
from operator import or_

import pytest

from jaxserve.engine.lattice import build_lattice
from jaxserve.engine.sampling_rows import (
    MAX_TOP_K,
    NEEDS_PROCESSORS,
    VARIANTS,
    Variant,
    covers,
    has_processors,
    needs_of,
    variant_for,
)
from jaxserve.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, top_p=0.9, top_k=1000)
PLAIN = SamplingParams()
NARROW = SamplingParams(top_k=MAX_TOP_K, top_p=0.95, min_p=0.1)
WIDE = SamplingParams(top_k=MAX_TOP_K + 1)
NUCLEUS = SamplingParams(top_p=0.95)
PENALISED = SamplingParams(temperature=0, presence_penalty=1)
PENALISED_NARROW = SamplingParams(top_k=1, logit_bias={3: 1.0})
PENALISED_PLAIN = SamplingParams(repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("batch", "variant"),
    [
        ([GREEDY], "greedy"),
        ([PLAIN], "temperature"),
        ([NARROW], "top_k"),
        ([SamplingParams(top_k=1)], "top_k"),
        ([WIDE], "random"),
        ([NUCLEUS], "random"),
        ([SamplingParams(min_p=0.1)], "random"),
        ([GREEDY, PLAIN], "temperature"),
        ([GREEDY, NARROW], "top_k"),
        ([PLAIN, NARROW], "random"),
        ([NUCLEUS, NARROW, GREEDY], "random"),
        ([PENALISED], "full_top_k"),
        ([PENALISED_NARROW, GREEDY], "full_top_k"),
        ([PENALISED, NARROW], "full_top_k"),
        ([PENALISED, PLAIN], "full"),
        ([PENALISED_PLAIN], "full"),
        ([PENALISED_NARROW, NUCLEUS], "full"),
        ([SamplingParams(temperature=0, allowed_token_ids=[4])], "full_top_k"),
    ],
)
def test_a_batch_gets_the_cheapest_variant_that_honours_every_row(
    batch: list[SamplingParams], variant: Variant
) -> None:
    assert variant_for(reduce(or_, map(needs_of, batch))) == variant


def test_a_mask_needs_a_variant_that_takes_one() -> None:
    for params in (GREEDY, PLAIN, NARROW, NUCLEUS):
        assert has_processors(variant_for(needs_of(params) | NEEDS_PROCESSORS))


def test_a_variant_covers_what_its_rows_could_have_had_apart() -> None:
    rows = (GREEDY, PLAIN, NARROW, WIDE, NUCLEUS, PENALISED, PENALISED_NARROW, PENALISED_PLAIN)
    for one, other in product(rows, rows):
        both = variant_for(needs_of(one) | needs_of(other))
        assert covers(both, variant_for(needs_of(one)))
        assert covers(both, variant_for(needs_of(other)))
    assert all(covers("full", variant) and covers(variant, "greedy") for variant in VARIANTS)
    assert not covers("top_k", "temperature")
    assert not covers("full_top_k", "random")


def test_where_a_step_branches_at_run_time_there_are_fewer_variants() -> None:
    def samplers(platform: str) -> set[Variant]:
        lattice = build_lattice(
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            max_model_len=100,
            page_size=16,
            platform=platform,
            hidden_size=4096,
        )
        return {lattice.sample(256, variant, False).variant for variant in VARIANTS}

    assert samplers("tpu") == set(VARIANTS)
    assert samplers("gpu") == {"greedy", "random", "full"}
    assert samplers("cpu") == {"greedy", "full"}
