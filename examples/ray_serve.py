"""Several jaxserve replicas behind Ray Serve, which routes to them, scales them, and replaces those that die.

    make install EXTRAS=dev,ray
    .venv/bin/python examples/ray_serve.py                two replicas of SmolLM2; one is killed amid 50 streamed chats
    .venv/bin/python examples/ray_serve.py --serve MODEL  serves until Ctrl-C

The first form's exit status is 0 if every chat was answered, or failed in a way that tells a client to try again and
was answered then, and if the killed replica came back.  With --gpus N each replica is one model over N GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import httpx
    import openai
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.util import list_named_actors
    from starlette.middleware import Middleware
except ImportError as error:
    sys.exit(f"This example needs Ray Serve and the openai package ({error}): make install EXTRAS=dev,ray")

NAME, FOLDER = "jaxserve", Path(__file__).resolve().parent
NUM_CHATS, NUM_AT_ONCE, NUM_BEFORE_THE_KILL = 50, 12, 18
RETRY_SECONDS, BACK_SECONDS = 60, 180
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "What do bees make?",
    "How many legs has a dog?",
)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Any, Any, Send], Awaitable[None]]


def replica_builder(model: str, options: dict[str, Any], *, one_core: bool) -> Callable[[], EngineApp]:
    """What Ray calls in each replica's process."""

    def build() -> EngineApp:
        if one_core:  # before jax counts them
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
        return EngineApp(model, options)

    return build


class EngineApp:
    """An engine and the HTTP application that answers for it, as `jaxserve serve` has them."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from jaxserve.async_llm import AsyncLLM
        from jaxserve.config import EngineConfig
        from jaxserve.server.app import create_app
        from jaxserve.server.settings import ServerSettings

        self.llm = AsyncLLM.from_engine_config(EngineConfig(model=model, **options))
        self._app = create_app(self.llm, ServerSettings(served_model_names=(model,), log_requests=False))

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        await self._app(scope, receive, send)


class Replica:
    """What Ray asks beside requests."""

    app: EngineApp  # Ray's wrapper has it

    def check_health(self) -> None:
        """Ray starts another replica in place of one that raises here."""
        if self.app.llm.is_dead:
            raise RuntimeError(f"the engine cannot go on: {self.app.llm.error}")


class RetryableErrors:
    """Around Ray's proxy, which says little where a replica dies: an answer that cannot be given says so.

    Before its first byte it is a 503 with Retry-After, and later a last event with an error, as an engine's own death.
    """

    def __init__(self, app: AsgiApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_begun = is_ended = False

        async def pass_on(message: Message) -> None:
            nonlocal is_begun, is_ended
            is_begun = True
            is_ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, pass_on)
        if is_ended:
            return
        error = {
            "message": "A replica died; please try again.",
            "type": "ServiceUnavailableError",
            "code": None,
        }
        data = json.dumps({"error": error}).encode()
        if is_begun:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": False})
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": False})


def proxy_middlewares() -> list[Middleware]:
    """What Ray's proxies put around themselves."""
    return [Middleware(RetryableErrors)]  # pyright: ignore[reportArgumentType]  # an ASGI application, if not by name


def start(model: str, options: dict[str, Any], *, replicas: int, most: int, gpus: int, port: int) -> str:
    """Run the application on a Ray of this machine, or on the cluster that RAY_ADDRESS names; its URL."""
    # Ray's proxies read this when they start; on a cluster of your own set it where Ray is started.
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = f"{Path(__file__).stem}:proxy_middlewares"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    ray.init(num_cpus=None if gpus else replicas + 1, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options={"num_gpus": gpus} if gpus else {"num_cpus": 1},
        # By requests that a replica works on or has waiting: what jaxserve batches.
        autoscaling_config={"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": 32},
        max_ongoing_requests=256,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=60,
    )
    build = replica_builder(model, options, one_core=not gpus)
    serve.run(deployment(serve.ingress(build)(Replica)).bind(), name=NAME)  # waits until all are ready
    return f"http://127.0.0.1:{port}/v1"


@dataclass(frozen=True)
class Outcome:
    """How one chat ended: "answered", or how it failed and whether that tells a client to try again."""

    how: str
    may_retry: bool = False


async def chat(
    client: openai.AsyncOpenAI, model: str, number: int, on_begin: Callable[[], None] = lambda: None
) -> Outcome:
    """One streamed chat, without a second try; `on_begin` is called when the first of its answer is there."""
    message: Any = {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}
    finish_reason = None
    try:
        stream = await client.chat.completions.create(
            model=model, messages=[message], max_tokens=48, seed=number, stream=True
        )
        async for chunk in stream:
            if chunk.choices[0].delta.role is not None:
                on_begin()
            finish_reason = chunk.choices[0].finish_reason or finish_reason
    except openai.APIStatusError as error:
        return Outcome(
            f"got {error.status_code}", error.status_code == 503 and "retry-after" in error.response.headers
        )
    except (openai.APIConnectionError, httpx.TransportError) as error:
        return Outcome(f"lost its connection ({type(error).__name__})", may_retry=True)
    except openai.APIError as error:
        return Outcome(f"was broken off: {error.message}", may_retry=True)
    return Outcome("answered") if finish_reason else Outcome("ended without a finish_reason")


async def chats_amid_a_kill(url: str, model: str) -> list[str]:
    """Many chats, and the end of one replica; what is wrong with how that went."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    turn, num_begun = asyncio.Semaphore(NUM_AT_ONCE), 0

    def count() -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun == NUM_BEFORE_THE_KILL:
            kill_one()

    async def run(number: int) -> Outcome:
        async with turn:
            return await chat(client, model, number, count)

    outcomes = await asyncio.gather(*(run(number) for number in range(NUM_CHATS)))
    for how, count in Counter(outcome.how for outcome in outcomes).most_common():
        print(f"{count} of {NUM_CHATS} chats: {how}", flush=True)
    problems = [outcome.how for outcome in outcomes if outcome.how != "answered" and not outcome.may_retry]
    failed = [number for number, outcome in enumerate(outcomes) if outcome.how != "answered"]
    for number in failed:
        if not await answered_at_last(client, model, number):
            problems.append(f"chat {number} was not answered within {RETRY_SECONDS} s of further tries")
    if failed:
        print(f"tried again: {len(failed)} chats, {len(problems)} problems", flush=True)
    return problems


async def answered_at_last(client: openai.AsyncOpenAI, model: str, number: int) -> bool:
    """Whether a chat is answered if a client tries as often as it is told to."""
    deadline = time.monotonic() + RETRY_SECONDS
    while time.monotonic() < deadline:
        outcome = await chat(client, model, number)
        if outcome.how == "answered":
            return True
        await asyncio.sleep(1)
    return False


def replica_actors() -> set[str]:
    """Names of the replicas' actors, dead ones not among them."""
    names = {str(actor["name"]) for actor in list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith("SERVE_REPLICA::") and f"#{NAME}#" in name}


def num_running() -> int:
    """Replicas that take requests."""
    deployment = serve.status().applications[NAME].deployments[NAME]
    return {str(getattr(state, "value", state)): n for state, n in deployment.replica_states.items()}.get(
        "RUNNING", 0
    )


def kill_one() -> None:
    """End a replica's process without a warning."""
    victim = sorted(replica_actors())[0]
    ray.kill(ray.get_actor(victim, namespace="serve"), no_restart=True)
    print(f"killed {victim.rpartition('#')[2]}", flush=True)


def came_back(before: set[str]) -> bool:
    """Whether there are as many replicas as before, one of them new."""
    begun = time.monotonic()
    while time.monotonic() < begun + BACK_SECONDS:
        if num_running() == len(before) and replica_actors() - before:
            print(
                f"the replica came back within {time.monotonic() - begun:.0f} s of the last chat", flush=True
            )
            return True
        time.sleep(0.5)
    return False


def show_a_death(model: str, options: dict[str, Any], port: int) -> int:
    """The first form; see the top of this file."""
    url = start(model, options, replicas=2, most=2, gpus=0, port=port)
    before = replica_actors()
    print(f"{len(before)} replicas at {url}", flush=True)
    problems = asyncio.run(chats_amid_a_kill(url, model))
    if not came_back(before):
        problems.append(f"no new replica within {BACK_SECONDS} s")
    for problem in problems:
        print(f"failed: {problem}", flush=True)
    print("FAIL" if problems else "PASS", flush=True)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--serve", metavar="MODEL", help="serve this model until Ctrl-C")
    parser.add_argument("--replicas", type=int, default=2, help="the fewest (default: %(default)s)")
    parser.add_argument("--max-replicas", type=int, default=4, help="the most (default: %(default)s)")
    parser.add_argument(
        "--gpus", type=int, default=0, help="of each replica; 0: a CPU core (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8123, help="default: %(default)s")
    args = parser.parse_args()
    try:
        if args.serve is None:
            return show_a_death("smollm2", {"max_model_len": 1024, "max_num_seqs": 16}, args.port)
        options = {"tensor_parallel_size": args.gpus} if args.gpus > 1 else {}
        url = start(
            args.serve,
            options,
            replicas=args.replicas,
            most=args.max_replicas,
            gpus=args.gpus,
            port=args.port,
        )
        print(f"serving {args.serve} at {url} until Ctrl-C", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return 0
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
