"""Chats about images over HTTP: time to the first token and what of it is the image's, and a crowd of mixed chats.

    python benchmarks/vision.py --model DIR --serve-flag=--load-format=dummy --printable    # starts a server
    python benchmarks/vision.py --base-url http://127.0.0.1:8000

Alone, each of --repeat times: an image of --side x --side pixels that the server has not seen, the same one again, and
a text of as many tokens.  /tokenize tells what decoding and cutting up takes, without the engine.  What is left of the
difference between image and text is the vision tower's.  Then --concurrency chats at a time, every other one with an
image of one of several sizes.  Exit status 1 where a request failed or a program was compiled after "ready".
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from PIL import Image

from jaxserve.bench.http_client import HttpClient
from jaxserve.bench.load_generator import LoadGenerator, Prompt, RequestRecord
from jaxserve.bench.server_process import ServerProcess
from jaxserve.errors import JaxserveError

SIDES = (224, 448, 640, 1024)  # of the crowd's images
PRINTABLE = list(range(94))  # "!" to "~", in Qwen's tokenizer as in that of benchmarks.h100.models
QUESTION = "Describe this picture."


class Chats:
    """Conversations that no other one shares a prefix with."""

    def __init__(self, seed: int, max_tokens: int) -> None:
        self._numpy = np.random.default_rng(seed)
        self._random = random.Random(seed)
        self._max_tokens = max_tokens

    def with_image(self, side: int) -> Prompt:
        """About a picture of its own: colours that run into each other, with grain, as a JPEG."""
        colours = self._numpy.integers(0, 256, (8, 8, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        grain = self._numpy.integers(-12, 13, smooth.shape, np.int16)
        file = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        return Prompt([{"role": "user", "content": content}], self._max_tokens)

    def with_text(self, num_words: int) -> Prompt:
        """Digits and spaces, which nearly every tokenizer gives a token each."""
        words = " ".join(str(self._random.randrange(10)) for _ in range(num_words))
        return Prompt(f"{words}\n{QUESTION}", self._max_tokens)


def main() -> int:
    """Measure, print, and say whether all went well."""
    args = _parse()
    try:
        with ExitStack() as stack:
            url = args.base_url
            if url is None:
                if args.model is None:
                    raise JaxserveError("give --model, to start a server, or the --base-url of one")
                print(f"starting a server for {args.model} …", flush=True)
                url = stack.enter_context(ServerProcess(args.model, args.serve_flag)).url
            result = asyncio.run(measure(url, args))
    except JaxserveError as error:
        print(f"vision: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1))
    return 1 if result["compiles_after_ready"] else 0


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures, times in milliseconds.  Raises JaxserveError where a request fails."""
    root_url = url.rstrip("/").removesuffix("/v1")
    root, client = HttpClient(root_url), HttpClient(f"{root_url}/v1")
    try:
        models = json.loads((await client.get("/models")).body)
        generator = LoadGenerator(
            client,
            api="chat",
            model=models["data"][0]["id"],
            extra_body={
                "ignore_eos": True,
                "temperature": 0,
                **({"allowed_token_ids": PRINTABLE} if args.printable else {}),
            },
            timeout=600,
        )
        chats = Chats(args.seed, args.max_tokens)
        alone = await _alone(root, generator, chats, args)
        crowd = await _crowd(generator, chats, args)
        return {"alone": alone, "crowd": crowd, "compiles_after_ready": await _compiles(root)}
    finally:
        client.close()
        root.close()


async def _alone(
    root: HttpClient, generator: LoadGenerator, chats: Chats, args: argparse.Namespace
) -> dict[str, Any]:
    records: dict[str, list[RequestRecord]] = {"new image": [], "same image": [], "text": []}
    prepared: dict[str, list[float]] = {"image": [], "text": []}
    num_words = 1
    for i in range(args.repeat + 1):  # the first round is for warming up
        image, text = chats.with_image(args.side), chats.with_text(num_words)
        found = {
            "new image": await _ask(generator, image),
            "same image": await _ask(generator, image),
            "text": await _ask(generator, text),
        }
        missing = found["new image"].num_prompt_tokens - found["text"].num_prompt_tokens
        num_words = max(1, num_words + missing // 2)
        if i:
            for name, record in found.items():
                records[name].append(record)
            prepared["image"].append(await _prepare(root, image))
            prepared["text"].append(await _prepare(root, text))
    first = {name: _median([r.time_to_first_token for r in several]) for name, several in records.items()}
    preparing = statistics.median(prepared["image"]) - statistics.median(prepared["text"])
    tower = first["new image"] - first["text"] - preparing
    return {
        "side": args.side,
        "prompt_tokens": {name: several[-1].num_prompt_tokens for name, several in records.items()},
        "time_to_first_token_ms": {name: round(seconds * 1e3, 2) for name, seconds in first.items()},
        "preparing_image_ms": round(preparing * 1e3, 2),
        "tower_ms": round(tower * 1e3, 2),
        "tower_share_of_first_token": round(tower / first["new image"], 3),
        "time_per_output_token_ms": {
            name: round(_median([r.time_per_output_token for r in several]) * 1e3, 3)
            for name, several in records.items()
        },
    }


async def _crowd(generator: LoadGenerator, chats: Chats, args: argparse.Namespace) -> dict[str, Any]:
    prompts = [
        chats.with_text(100) if i % 2 else chats.with_image(SIDES[i // 2 % len(SIDES)])
        for i in range(args.requests)
    ]
    start = time.perf_counter()
    records = await generator.run_closed_loop(prompts, args.concurrency)
    seconds = time.perf_counter() - start
    _check(records)
    return {
        "requests": len(records),
        "concurrency": args.concurrency,
        "output_tokens_per_second": round(sum(r.num_output_tokens for r in records) / seconds, 1),
        "prompt_tokens_per_second": round(sum(r.num_prompt_tokens for r in records) / seconds, 1),
        "median_time_to_first_token_ms": round(_median([r.time_to_first_token for r in records]) * 1e3, 1),
    }


async def _ask(generator: LoadGenerator, prompt: Prompt) -> RequestRecord:
    record = await generator.ask(prompt)
    _check([record])
    return record


async def _prepare(root: HttpClient, prompt: Prompt) -> float:
    """Seconds from the body of a request to its token ids."""
    content = prompt.content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    body = json.dumps({"messages": messages}).encode()
    start = time.perf_counter()
    response = await root.post("/tokenize", body)
    seconds = time.perf_counter() - start
    if response.status != 200:
        raise JaxserveError(f"/tokenize answered {response.status}: {response.body[:200]!r}")
    return seconds


async def _compiles(root: HttpClient) -> int:
    lines = (await root.get("/metrics")).body.decode().splitlines()
    values = [line.split()[-1] for line in lines if line.startswith("jaxserve_compiles_after_ready_total")]
    if not values:
        raise JaxserveError("/metrics has no jaxserve_compiles_after_ready_total")
    return int(float(values[0]))


def _check(records: Sequence[RequestRecord]) -> None:
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise JaxserveError(f"{len(failed)} of {len(records)} requests failed, the first one: {failed[0]}")


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    if not known:
        raise JaxserveError("no answer has text: raise --max-tokens, or give --printable")
    return statistics.median(known)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="a running server (default: start one)")
    parser.add_argument("--model", help="of the server to start")
    parser.add_argument(
        "--serve-flag", action="append", default=[], help="flag of the server to start; may be repeated"
    )
    parser.add_argument("--side", type=int, default=1024, help="pixels (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=64, help="of the crowd (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--printable",
        action="store_true",
        help="answers of ASCII characters alone: for random weights, most of whose tokens have no text to stream",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
