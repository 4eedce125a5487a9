"""What to ask: random text of a given number of tokens, or prompts from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.bench.http_client import HttpClient, TransportError
from jaxserve.bench.load_generator import Prompt
from jaxserve.errors import ConfigError, JaxserveError

CountTokens = Callable[[str], Awaitable[int]]

# Common words: most tokenizers have each of them, with its space, as one token.
_WORD_LIST = """
about after again air all along also always animal another answer any area around ask away back ball
base because become been before began begin behind best better between big bird black blue boat body
book both box boy bring build busy call came can car carry cause center change check city class clear
close cold color come common could country course cross cut dark day deep did different direct do does
dog done door down draw drive dry during each early earth ease east eat end enough even ever every
example eye face fact fall family far farm fast father feel feet few field figure fill final find fine
fire first fish five fly follow food foot for force form found four free friend from front full game
gave get girl give go gold good got govern great green ground group grow had half hand happen hard has
have he head hear heat help her here high him his hold home horse hot hour house how hundred if in inch
interest is island it just keep kind king knew know land language large last late laugh lead learn leave
left
"""
_WORDS = tuple(_WORD_LIST.split())
_MAX_ADJUSTMENTS = 20


async def random_prompts(
    count: int,
    *,
    input_len: int,
    output_len: int,
    count_tokens: CountTokens,
    seed: int,
    range_ratio: float = 0.0,
    shared_prefix_len: int = 0,
) -> list[Prompt]:
    """`count` prompts of random words, each exactly `input_len` tokens as `count_tokens` sees them.

    With `range_ratio` r, both lengths vary uniformly from (1 - r) to (1 + r) times the given ones.
    The first `shared_prefix_len` words (about as many tokens) are the same in all prompts.
    """
    if shared_prefix_len >= input_len:
        raise ConfigError(f"a shared prefix of {shared_prefix_len} tokens does not leave room in {input_len}")
    rng = random.Random(seed)
    prefix = [rng.choice(_WORDS) for _ in range(shared_prefix_len)]
    overhead = await _special_tokens(count_tokens)
    prompts = []
    for _ in range(count):
        target = max(_vary(rng, input_len, range_ratio), shared_prefix_len + 1, overhead + 1)
        text, num_tokens = await _text_of(rng, target, prefix, overhead, count_tokens)
        prompts.append(Prompt(text, max(_vary(rng, output_len, range_ratio), 1), num_tokens))
    return prompts


def dataset_prompts(path: Path, count: int, *, output_len: int | None, seed: int) -> list[Prompt]:
    """`count` prompts drawn from a file without repeating (with repeating once all are used).

    JSONL: `{"prompt": …}` or `{"messages": […]}` a line, optionally with `max_tokens`.  JSON: a ShareGPT list
    of `{"conversations": [{"from": "human", "value": …}, …]}`, of which the first question is asked.
    `output_len` overrides `max_tokens`; lines without either ask for 128 tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path {path}: {getattr(error, 'strerror', None) or error}") from error
    entries = _entries(path, text)
    prompts = [prompt for where, entry in entries if (prompt := _prompt_of(path, where, entry, output_len))]
    if not prompts:
        raise ConfigError(f"--dataset-path {path}: no prompts in it")
    rng = random.Random(seed)
    chosen: list[Prompt] = []
    while len(chosen) < count:
        rng.shuffle(prompts)
        chosen += prompts[: count - len(chosen)]
    return chosen


def server_token_counter(client: HttpClient, root: HttpClient, model: str) -> CountTokens:
    """Counts with the server's own POST /tokenize, which is at the root, or with some servers under /v1."""
    found: list[HttpClient] = []

    async def count(text: str) -> int:
        body = msgspec.json.encode({"model": model, "prompt": text})
        for candidate in found or (root, client):
            response = await candidate.post("/tokenize", body)
            if response.status == 200:
                found[:] = [candidate]
                try:
                    return int(msgspec.json.decode(response.body)["count"])
                except (msgspec.MsgspecError, LookupError, TypeError, ValueError) as error:
                    raise TransportError(f"{candidate.url}/tokenize does not answer with a count") from error
        raise JaxserveError(
            f"{root.url} has no /tokenize to count prompt tokens with; give --tokenizer NAME_OR_PATH"
        )

    return count


def local_token_counter(tokenizer: str) -> CountTokens:
    """Counts with a Hugging Face tokenizer on this machine."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer {tokenizer}: {' '.join(str(error).split())}") from error

    async def count(text: str) -> int:
        return len(loaded(text)["input_ids"])

    return count


async def _special_tokens(count_tokens: CountTokens) -> int:
    """Tokens that are added to any text, such as a begin-of-text token."""
    one, two = await count_tokens("the"), await count_tokens("the the")
    return max(one - (two - one), 0)


async def _text_of(
    rng: random.Random, target: int, prefix: list[str], overhead: int, count_tokens: CountTokens
) -> tuple[str, int]:
    words = prefix + [rng.choice(_WORDS) for _ in range(max(target - overhead - len(prefix), 1))]
    num_tokens = await count_tokens(" ".join(words))
    for _ in range(_MAX_ADJUSTMENTS):
        if num_tokens == target:
            break
        if num_tokens > target:
            del words[max(len(words) - (num_tokens - target), 1) :]
        else:
            words += [rng.choice(_WORDS) for _ in range(target - num_tokens)]
        num_tokens = await count_tokens(" ".join(words))
    # A tokenizer that cuts these words small may step over the target: then what was counted is reported.
    return " ".join(words), num_tokens


def _vary(rng: random.Random, length: int, ratio: float) -> int:
    return round(length * rng.uniform(1 - ratio, 1 + ratio)) if ratio else length


def _entries(path: Path, text: str) -> list[tuple[str, Any]]:
    """(place in the file, parsed entry) of every entry."""
    try:
        if text.lstrip().startswith("["):
            return [(f"entry {i}", entry) for i, entry in enumerate(json.loads(text), 1)]
        return [(f"line {i}", json.loads(line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    except ValueError as error:
        raise ConfigError(f"--dataset-path {path}: not JSON: {error}") from error


def _prompt_of(path: Path, where: str, entry: Any, output_len: int | None) -> Prompt | None:
    if not isinstance(entry, dict):
        raise ConfigError(f"--dataset-path {path}, {where}: must be an object, not {type(entry).__name__}")
    max_tokens = output_len or entry.get("max_tokens") or entry.get("output_tokens") or 128
    if "conversations" in entry:
        turns = entry["conversations"]
        question = turns[0].get("value") if turns else None
        return Prompt(question, max_tokens) if question else None  # ShareGPT has empty conversations
    content = entry.get("messages", entry.get("prompt"))
    if not isinstance(content, str | list) or not content:
        raise ConfigError(
            f"--dataset-path {path}, {where}: has neither `prompt` nor `messages` nor `conversations`"
        )
    return Prompt(content, max_tokens)
