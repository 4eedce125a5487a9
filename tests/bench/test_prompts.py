"""Random prompts of an exact length, and prompts from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.bench.http_client import HttpClient
from jaxserve.bench.prompts import dataset_prompts, random_prompts, server_token_counter
from jaxserve.errors import ConfigError, JaxserveError
from tests.bench.fake_server import FakeServer


async def words_and_begin_token(text: str) -> int:
    return 1 + len(text.split())


async def long_words_are_two(text: str) -> int:
    return sum(1 + (len(word) > 5) for word in text.split())


@pytest.mark.parametrize("count_tokens", [words_and_begin_token, long_words_are_two])
async def test_every_prompt_has_the_length(count_tokens) -> None:
    prompts = await random_prompts(20, input_len=33, output_len=7, count_tokens=count_tokens, seed=1)
    assert [await count_tokens(prompt.content) for prompt in prompts] == [33] * 20
    assert [prompt.num_tokens for prompt in prompts] == [33] * 20
    assert [prompt.max_tokens for prompt in prompts] == [7] * 20
    assert len({str(prompt.content) for prompt in prompts}) == 20


async def test_lengths_vary_within_the_ratio() -> None:
    prompts = await random_prompts(
        200, input_len=40, output_len=20, count_tokens=words_and_begin_token, seed=1, range_ratio=0.5
    )
    lengths = [prompt.num_tokens for prompt in prompts if prompt.num_tokens is not None]
    assert (min(lengths), max(lengths)) == (20, 60)
    assert {prompt.max_tokens for prompt in prompts} == set(range(10, 31))


async def test_a_shared_prefix_is_shared() -> None:
    prompts = await random_prompts(
        5, input_len=20, output_len=1, count_tokens=words_and_begin_token, seed=1, shared_prefix_len=8
    )
    assert len({tuple(str(prompt.content).split()[:8]) for prompt in prompts}) == 1
    assert len({tuple(str(prompt.content).split()[8:]) for prompt in prompts}) == 5


async def test_a_prefix_as_long_as_the_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="shared prefix"):
        await random_prompts(
            1, input_len=8, output_len=1, count_tokens=words_and_begin_token, seed=1, shared_prefix_len=8
        )


async def test_the_server_counts(server: FakeServer) -> None:
    root, client = HttpClient(server.url), HttpClient(f"{server.url}/v1")
    count = server_token_counter(client, root, "fake")
    assert await count("one two three") == 4
    without = server_token_counter(client, client, "fake")
    with pytest.raises(JaxserveError, match="--tokenizer"):
        await without("one")
    root.close()
    client.close()


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "b"}]
    path.write_text(
        json.dumps({"prompt": "a", "max_tokens": 5}) + "\n\n" + json.dumps({"messages": messages}) + "\n"
    )
    prompts = dataset_prompts(path, 2, output_len=None, seed=0)
    assert {(str(p.content), p.max_tokens) for p in prompts} == {("a", 5), (str(messages), 128)}
    assert {p.max_tokens for p in dataset_prompts(path, 2, output_len=9, seed=0)} == {9}


def test_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": []}]))
    [prompt] = dataset_prompts(path, 1, output_len=None, seed=0)
    assert prompt.content == "question"


def test_more_prompts_than_the_file_has_repeat_it_evenly(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": name}) + "\n" for name in "abc"))
    contents = [str(p.content) for p in dataset_prompts(path, 7, output_len=None, seed=0)]
    assert {name: contents[:6].count(name) for name in "abc"} == {"a": 2, "b": 2, "c": 2}
    assert len(contents) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no prompts"),
        ("3\n", "line 1: must be an object"),
        ('{"text": "a"}\n', "line 1: has neither"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        dataset_prompts(path, 1, output_len=None, seed=0)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        dataset_prompts(tmp_path / "none", 1, output_len=None, seed=0)
