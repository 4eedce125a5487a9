"""`jaxserve bench serve`: load on a running server."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.bench import prompts as prompt_sources
from jaxserve.bench.arrivals import poisson_arrivals
from jaxserve.bench.http_client import HttpClient
from jaxserve.bench.load_generator import Api, LoadGenerator, Prompt, RequestRecord
from jaxserve.bench.report import load_metrics
from jaxserve.errors import JaxserveError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """One load run: where, what, how much and how fast."""

    base_url: str  # with or without /v1
    model: str | None = None  # None: the first that the server lists
    api: Api = "completions"
    num_prompts: int = 100
    input_len: int = 512
    output_len: int = 128
    range_ratio: float = 0.0
    shared_prefix_len: int = 0
    dataset_path: Path | None = None
    dataset_output_len: int | None = None
    request_rate: float = math.inf  # requests per second
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 1
    tokenizer: str | None = None  # None: the server counts tokens
    ignore_eos: bool = True
    temperature: float | None = 0.0
    seed: int = 0
    timeout: float = 600.0  # seconds for one request
    api_key: str | None = None
    show_progress: bool = True


def run_load(spec: LoadSpec) -> dict[str, Any]:
    """Warm up, send the load, and return the metrics.  JaxserveError if the server does not work at all."""
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: the standard loop does the same, slower
        return asyncio.run(_run(spec))
    return uvloop.run(_run(spec))


async def _run(spec: LoadSpec) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {spec.api_key}"} if spec.api_key else {}
    root_url = spec.base_url.rstrip("/").removesuffix("/v1")
    root, client = HttpClient(root_url, headers), HttpClient(f"{root_url}/v1", headers)
    try:
        model = spec.model or await _first_model(client)
        prompts = await _prompts(spec, client, root, model)
        generator = LoadGenerator(
            client, api=spec.api, model=model, extra_body=_extra_body(spec), timeout=spec.timeout
        )
        # Prompts of their own: those that are measured must not lie in the prefix cache.
        warm_ups, prompts = prompts[: spec.num_warmups], prompts[spec.num_warmups :]
        await _warm_up(generator, warm_ups)
        with _quiet_collector(), _progress(len(prompts), spec.show_progress) as on_done:
            cpu_start, start = time.process_time(), time.perf_counter()
            records = await _send(generator, prompts, spec, on_done)
            duration = time.perf_counter() - start
            cpu_share = (time.process_time() - cpu_start) / duration
    finally:
        client.close()
        root.close()
    metrics = load_metrics(records, duration)
    return {"model": model, **metrics, "load_generator_cpu_share": cpu_share}


async def _send(
    generator: LoadGenerator, prompts: list[Prompt], spec: LoadSpec, on_done: Callable[[RequestRecord], None]
) -> list[RequestRecord]:
    if math.isinf(spec.request_rate):
        return await generator.run_closed_loop(prompts, spec.max_concurrency or len(prompts), on_done)
    arrivals = poisson_arrivals(spec.request_rate, len(prompts), seed=spec.seed, burstiness=spec.burstiness)
    return await generator.run_arrivals(
        prompts, arrivals, max_concurrency=spec.max_concurrency, on_done=on_done
    )


async def _first_model(client: HttpClient) -> str:
    response = await client.get("/models")
    try:
        return msgspec.json.decode(response.body)["data"][0]["id"]
    except (msgspec.MsgspecError, LookupError, TypeError) as error:
        raise JaxserveError(
            f"{client.url}/models answered {response.status} and lists no model; give --model"
        ) from error


async def _prompts(spec: LoadSpec, client: HttpClient, root: HttpClient, model: str) -> list[Prompt]:
    """Prompts to warm up with, then those to measure."""
    count = spec.num_warmups + spec.num_prompts
    if spec.dataset_path is not None:
        return prompt_sources.dataset_prompts(
            spec.dataset_path, count, output_len=spec.dataset_output_len, seed=spec.seed
        )
    if spec.tokenizer:
        count_tokens = prompt_sources.local_token_counter(spec.tokenizer)
    else:
        count_tokens = prompt_sources.server_token_counter(client, root, model)
    return await prompt_sources.random_prompts(
        count,
        input_len=spec.input_len,
        output_len=spec.output_len,
        count_tokens=count_tokens,
        seed=spec.seed,
        range_ratio=spec.range_ratio,
        shared_prefix_len=spec.shared_prefix_len,
    )


def _extra_body(spec: LoadSpec) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if spec.temperature is not None:
        body["temperature"] = spec.temperature
    if spec.ignore_eos:
        body["ignore_eos"] = True
    return body


async def _warm_up(generator: LoadGenerator, prompts: list[Prompt]) -> None:
    """Send prompts one by one; a server that fails here gets no load."""
    for prompt in prompts:
        record = await generator.ask(prompt)
        if record.error is not None:
            raise JaxserveError(f"the first request failed, so no load was sent: {record.error}")


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """A collection of everything loaded so far would show up as a latency of the server."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _progress:
    """A bar on stderr; gives a function to call with each finished request."""

    def __init__(self, total: int, is_shown: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit="req", disable=not is_shown, file=sys.stderr)
        self._failed = 0

    def __enter__(self) -> Callable[[RequestRecord], None]:
        return self._on_done

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _on_done(self, record: RequestRecord) -> None:
        if record.error is not None:
            self._failed += 1
            self._bar.set_postfix(failed=self._failed)
        self._bar.update()
