"""Where sampling defaults come from, and what is refused at start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import replicas
from jaxserve.errors import ConfigError
from jaxserve.generation_config import generation_defaults
from jaxserve.llm import LLM
from jaxserve.loading import resolve
from jaxserve.loading.checkpoint import GenerationDefaults
from jaxserve.sampling_params import SamplingParams
from jaxserve.text import tokenizer
from tests.engine.tiny_engine import TINY
from tests.scripted import ScriptedClient
from tests.tiny import byte_tokenizer

MODEL = GenerationDefaults((7, 8), {"temperature": 0.6, "top_k": 20, "max_tokens": 100})


def defaults(model: GenerationDefaults = MODEL, **options: Any) -> GenerationDefaults:
    return generation_defaults(EngineConfig(model="m", **options), model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    values = {"top_p": 0.5, "max_new_tokens": 30, "eos_token_id": 9, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    return tmp_path


def test_auto_is_the_models_own():
    assert defaults() == MODEL


def test_vllm_keeps_only_the_end_tokens():
    assert defaults(generation_config="vllm") == GenerationDefaults((7, 8))


def test_a_directory_counts_instead_of_the_model(folder: Path):
    expected = GenerationDefaults((9,), {"top_p": 0.5, "max_tokens": 30}, max_tokens_limit=30)
    assert defaults(generation_config=str(folder)) == expected
    assert defaults(generation_config=str(folder / "generation_config.json")) == expected


def test_the_override_replaces_single_values(folder: Path):
    changed = defaults(override_generation_config={"temperature": 1, "min_p": 0.1})
    assert changed.sampling == {"temperature": 1.0, "top_k": 20, "max_tokens": 100, "min_p": 0.1}
    assert changed.max_tokens_limit is None  # the model's own max_new_tokens is a default, no limit
    bare = defaults(generation_config="vllm", override_generation_config={"max_new_tokens": 5})
    assert (bare.sampling, bare.max_tokens_limit) == ({"max_tokens": 5}, 5)
    both = defaults(generation_config=str(folder), override_generation_config={"max_new_tokens": 5})
    assert (both.sampling, both.max_tokens_limit) == ({"top_p": 0.5, "max_tokens": 5}, 5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"generation_config": ""}, "generation_config='': use auto, vllm"),
        ({"generation_config": "/not/here"}, "generation_config='/not/here': .*No such file"),
        ({"override_generation_config": [1]}, "override_generation_config=.*give an object"),
        ({"override_generation_config": {"do_sample": True}}, "'do_sample' has no effect here; there are"),
        ({"override_generation_config": {"temperature": 3}}, r"override_generation_config: .* in \[0, 2\]"),
        ({"override_generation_config": {"top_k": "many"}}, "top_k is 'many'; it must be a whole number"),
        ({"override_generation_config": {"max_new_tokens": 0}}, "max_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        defaults(**options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"top_p": 9}', r"in \(0, 1\]"),
    ],
    ids=["open", "endless", "list", "top_p"],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: str, says: str):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        defaults(generation_config=str(tmp_path))


def test_a_models_impossible_defaults_stop_the_start_and_say_how_to_go_on():
    broken = GenerationDefaults((), {"top_p": 0.0})
    with pytest.raises(ConfigError, match="generation_config=vllm does without"):
        defaults(broken)
    assert defaults(broken, generation_config="vllm").sampling == {}


def test_an_engine_is_assembled_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(resolve, "open_config", lambda model, revision: (TINY, MODEL, tmp_path))
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda path: byte_tokenizer())
    monkeypatch.setattr(replicas, "build_replicas", lambda *arguments: ScriptedClient())
    override = {"temperature": 0.25, "max_new_tokens": 3}
    with LLM("m", load_format="dummy", generation_config="vllm", override_generation_config=override) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.max_tokens) == (0.25, 0, 3)
        assert llm.generate("abcdef", use_tqdm=False)[0].outputs[0].text == "abc"
        # As in vLLM the limit is a server's: who builds parameters here means them.
        longer = llm.generate("abcdef", SamplingParams(max_tokens=5), use_tqdm=False)
        assert longer[0].outputs[0].text == "abcde"
