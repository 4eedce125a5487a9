"""Which devices an engine gets, and what it is told where there are too few."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import pytest

from jaxserve.engine.devices import engine_devices
from jaxserve.errors import ConfigError
from tests.engine.tiny_engine import tiny_config


def devices(count: int, platform: str, kind: str) -> Any:
    found = [SimpleNamespace(platform=platform, device_kind=kind, id=i) for i in range(count)]
    return mock.patch.object(jax, "devices", return_value=found)


def test_an_engine_gets_the_first_devices_or_those_it_is_given() -> None:
    config = tiny_config("", tensor_parallel_size=2)
    with devices(4, "gpu", "H100"):
        assert [device.id for device in engine_devices(config)] == [0, 1]
        assert [device.id for device in engine_devices(config, jax.devices()[2:])] == [2, 3]


def test_too_few_are_counted() -> None:
    config = tiny_config("", tensor_parallel_size=4)
    with devices(2, "gpu", "H100"), pytest.raises(ConfigError) as error:
        engine_devices(config)
    assert str(error.value) == "tensor_parallel_size=4: there are 2 (H100); lower it to at most 2"
    with devices(1, "cpu", "cpu"), pytest.raises(ConfigError) as error:
        engine_devices(config)
    assert "there is 1 (cpu)" in str(error.value)
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=4 NPROC=8" in str(error.value)


def test_replicas_of_one_device_have_no_experts_to_deal_out() -> None:
    tiny_config("", data_parallel_size=2, tensor_parallel_size=2, enable_expert_parallel=True)
    with pytest.raises(
        ConfigError, match=r"enable_expert_parallel=True: .* data_parallel_size=2 has one; set tensor_"
    ):
        tiny_config("", data_parallel_size=2, enable_expert_parallel=True)
