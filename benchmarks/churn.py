"""Many streamed requests, a third of them hung up at random: afterwards the server must be as good as new.

    python benchmarks/churn.py                                  # starts a server of its own
    python benchmarks/churn.py --base-url http://127.0.0.1:8000

Passes when, after the last request, every KV page is free, nothing runs or waits, no connection and no
asyncio task is left over, resident memory has grown by at most --memory-bound since the end of the warm-up,
and the server answers a question with the same text as at the start.  Exit status 0 or 1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from jaxserve.bench.http_client import HttpClient, TransportError
from jaxserve.bench.load_generator import LoadGenerator, Prompt, RequestRecord
from jaxserve.bench.server_process import server_at
from jaxserve.cli.quantities import num_bytes
from jaxserve.errors import JaxserveError

HUNG_UP_SHARE = 1 / 3
MAX_TOKENS = 48
SETTLE_SECONDS = (
    10.0  # a vanished client is noticed within a step; a server that needs longer than this fails
)
CLOSE_SECONDS = 0.5  # until the server has noticed that idle connections are closed
QUESTION = "What is the capital of France? Answer in one sentence."
TOPICS = (
    "the sea",
    "a lighthouse",
    "winter",
    "an old clock",
    "two cats",
    "the first train",
    "bread",
    "a lost letter",
)


@dataclass(frozen=True)
class ServerState:
    """What /metrics says about the server's insides."""

    running: float
    waiting: float
    pages_used: float  # share of all KV pages
    tasks: float | None  # asyncio tasks, where the server tells
    open_files: float
    resident_bytes: float
    compiles_after_ready: float

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or holds a page."""
        return self.running == self.waiting == self.pages_used == 0


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    name: str
    found: str
    wanted: str
    passed: bool


def main() -> int:
    """Run the churn and print the verdict."""
    args = _parse()
    try:
        if args.base_url is None:
            print(f"starting a server with {args.model} …", file=sys.stderr, flush=True)
        with server_at(args.base_url, args.model, args.serve_flag) as url:
            checks = asyncio.run(churn(url, args))
    except JaxserveError as error:
        print(f"churn: error: {error}", file=sys.stderr)
        return 1
    return _print_verdict(checks)


async def churn(url: str, args: argparse.Namespace) -> list[Check]:
    """Warm up, note the server's state, churn, wait until it is idle, and compare."""
    root_url = url.rstrip("/").removesuffix("/v1")
    root, client = HttpClient(root_url), HttpClient(f"{root_url}/v1")
    try:
        model = await _first_model(client)
        generator = LoadGenerator(
            client, api="chat", model=model, extra_body={"ignore_eos": True}, timeout=600
        )
        asker = LoadGenerator(client, api="chat", model=model, extra_body={"temperature": 0}, timeout=600)
        answer_before = await _ask(asker)
        await _run(generator, args.warmup, args, seed=args.seed + 1, what="warm-up")
        before = await _settled_state(root, client)
        start = time.perf_counter()
        outcomes = await _run(generator, args.requests, args, seed=args.seed, what="churn")
        seconds = time.perf_counter() - start
        after = await _settled_state(root, client)
        answer_after = await _ask(asker)
    finally:
        client.close()
        root.close()
    print(f"{args.requests} requests in {seconds:.1f} s: {dict(outcomes)}")
    return _checks(args, outcomes, before, after, answer_before, answer_after)


async def _run(
    generator: LoadGenerator, count: int, args: argparse.Namespace, *, seed: int, what: str
) -> Counter[str]:
    """Send `count` requests, `args.concurrency` at a time, with progress on stderr; returns how they ended."""
    rng = random.Random(seed)
    # Exactly a third, each at its own moment: before the first token, in the middle, near the end.
    leaves_early = [i < round(count * HUNG_UP_SHARE) for i in range(count)]
    rng.shuffle(leaves_early)
    queue = iter(leaves_early)
    outcomes: Counter[str] = Counter()

    async def worker() -> None:
        for leaves in queue:
            topic = " and ".join(rng.sample(TOPICS, rng.randint(1, 5)))
            text = f"({rng.randrange(10**6)}) Tell a story about {topic}."
            prompt = Prompt(text, rng.randint(MAX_TOKENS // 2, MAX_TOKENS))
            num_chunks = rng.randrange(prompt.max_tokens - 4) if leaves else None
            outcomes[await _one(generator, prompt, num_chunks)] += 1
            bar.update()

    with tqdm(total=count, desc=what, unit="req", file=sys.stderr) as bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(args.concurrency):
                group.create_task(worker())
    return outcomes


async def _one(generator: LoadGenerator, prompt: Prompt, hang_up_after: int | None) -> str:
    """Send one request and hang up once `hang_up_after` chunks have come (0: as soon as it is sent)."""
    if hang_up_after is None:
        record = await generator.ask(prompt)
        return _outcome(record)
    seen = 0
    enough = asyncio.Event()

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen >= hang_up_after:
            enough.set()

    request = asyncio.create_task(generator.ask(prompt, count))
    if hang_up_after == 0:
        await asyncio.sleep(0.01)  # let it reach the server, but no further
    else:
        waiter = asyncio.create_task(enough.wait())
        await asyncio.wait((request, waiter), return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
    if request.done():
        return _outcome(request.result())
    request.cancel()  # closes the connection
    await asyncio.wait((request,))
    return "hung up"


def _outcome(record: RequestRecord) -> str:
    return "answered" if record.error is None else f"failed: {record.error}"


async def _ask(generator: LoadGenerator) -> str:
    record = await generator.ask(Prompt(QUESTION, MAX_TOKENS))
    if record.error is not None:
        raise JaxserveError(f"the server does not answer: {record.error}")
    return record.text


async def _settled_state(root: HttpClient, client: HttpClient) -> ServerState:
    """The state once the server is idle, or after SETTLE_SECONDS; without our own connections."""
    client.close()
    await asyncio.sleep(CLOSE_SECONDS)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        state = await _state(root)
        if state.is_idle or time.monotonic() > deadline:
            return state
        await asyncio.sleep(0.1)


async def _state(root: HttpClient) -> ServerState:
    from prometheus_client.parser import text_string_to_metric_families

    response = await root.get("/metrics")
    if response.status != 200:
        raise TransportError(f"{root.url}/metrics answered {response.status}")
    families = text_string_to_metric_families(response.body.decode())
    values = {
        sample.name.rpartition(":")[2]: sample.value for family in families for sample in family.samples
    }
    try:
        return ServerState(
            running=values["num_requests_running"],
            waiting=values["num_requests_waiting"],
            pages_used=values["kv_cache_usage_perc"],
            tasks=values.get("asyncio_tasks"),
            open_files=values["process_open_fds"],
            resident_bytes=values["process_resident_memory_bytes"],
            compiles_after_ready=values["jaxserve_compiles_after_ready_total"],
        )
    except KeyError as error:
        raise JaxserveError(f"{root.url}/metrics has no {error.args[0]}") from error


async def _first_model(client: HttpClient) -> str:
    import json

    response = await client.get("/models")
    if response.status != 200:
        raise TransportError(f"{client.url}/models answered {response.status}")
    return json.loads(response.body)["data"][0]["id"]


def _checks(
    args: argparse.Namespace,
    outcomes: Counter[str],
    before: ServerState,
    after: ServerState,
    answer_before: str,
    answer_after: str,
) -> list[Check]:
    failed = sum(count for outcome, count in outcomes.items() if outcome.startswith("failed"))
    wanted_hang_ups = round(args.requests * HUNG_UP_SHARE)
    grown = after.resident_bytes - before.resident_bytes
    checks = [
        Check("requests that failed", str(failed), "0", failed == 0),
        Check(
            "requests hung up",
            str(outcomes["hung up"]),
            f"about {wanted_hang_ups}",
            outcomes["hung up"] >= 0.9 * wanted_hang_ups,  # an answer may be done before its client leaves
        ),
        Check("KV pages in use", f"{after.pages_used:.2%}", "0.00%", after.pages_used == 0),
        Check("requests running", f"{after.running:.0f}", "0", after.running == 0),
        Check("requests waiting", f"{after.waiting:.0f}", "0", after.waiting == 0),
        Check(
            "open files and connections",
            f"{after.open_files:.0f}",
            f"at most {before.open_files:.0f} + 2",
            after.open_files <= before.open_files + 2,
        ),
        Check(
            "resident memory grown by",
            f"{grown / 2**20:+.1f} MiB of {before.resident_bytes / 2**20:.0f}",
            f"at most {args.memory_bound / 2**20:.0f} MiB",
            grown <= args.memory_bound,
        ),
        Check(
            "compiles after ready", f"{after.compiles_after_ready:.0f}", "0", after.compiles_after_ready == 0
        ),
        Check("the answer is still", repr(answer_after), repr(answer_before), answer_after == answer_before),
    ]
    if before.tasks is not None and after.tasks is not None:
        wanted = f"at most {before.tasks:.0f} + 2"
        checks.insert(
            5, Check("asyncio tasks", f"{after.tasks:.0f}", wanted, after.tasks <= before.tasks + 2)
        )
    return checks


def _print_verdict(checks: list[Check]) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "found", "wanted", "", title="after the churn")
    for check in checks:
        table.add_row(check.name, check.found, check.wanted, "ok" if check.passed else "[bold red]NO[/]")
    Console(width=max(Console().width, 120)).print(table)
    passed = all(check.passed for check in checks)
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="a running server (default: start one)")
    parser.add_argument(
        "--model", default="smollm2", help="model of the server to start (default: %(default)s)"
    )
    parser.add_argument(
        "--serve-flag", action="append", default=[], help="flag of the server to start; may be repeated"
    )
    parser.add_argument("--requests", type=int, default=500, help="default: %(default)s")
    parser.add_argument(
        "--warmup", type=int, default=100, help="requests before the count (default: %(default)s)"
    )
    parser.add_argument("--concurrency", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--memory-bound",
        type=num_bytes,
        default=32 * 2**20,
        help="growth of resident memory allowed (default: 32M)",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
