"""The forward passes of a TPU engine, lowered on a machine that has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxserve.config import EngineConfig
from tests.engine.pretend_device import pretend_book
from tests.engine.tiny_engine import TINY
from tests.kernels_pallas.lowering import DEVICES


@pytest.mark.parametrize("head_dim", [128, 64])
def test_forward_passes_lower_with_our_kernels_where_these_take_them(head_dim: int) -> None:
    model = replace(TINY, head_dim=head_dim, hidden_size=128)

    def lower(jitted: Any, *specs: Any) -> jax.stages.Lowered:
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=DEVICES["tpu"])):
            return jitted.trace(*specs).lower(lowering_platforms=("tpu",))

    config = EngineConfig(model="tiny", max_num_seqs=4, max_num_batched_tokens=64)
    with pretend_book(config, model, lower, memory=2**30, platform="tpu") as (settings, book):
        assert (settings.platform, settings.kv_dtype) == ("tpu", "bfloat16")
        programs = [program for program in book if program.name.startswith("forward")]
        assert len(programs) >= 3
        for program in programs:
            text = program.lower().as_text()
            assert text.count("tf.aliasing_output") >= model.num_layers + 1, program.name
            for kernel in ("write_kv_tpu", "paged_attention_tpu"):
                assert (kernel in text) == (head_dim == 128), program.name
