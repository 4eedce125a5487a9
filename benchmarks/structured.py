"""Answers that follow a JSON schema: do they validate, what do they cost, and whom do they hold up?

    python benchmarks/structured.py                                  # starts a server of its own
    python benchmarks/structured.py --limit 20 --output result.json
    python benchmarks/structured.py --base-url http://127.0.0.1:8000

1. 200 varied schemas (some by hand, the rest from a seeded generator): the share of answers with finish_reason "stop"
   that `jsonschema` accepts.  Must be 100 %.
2. Time to first token with a schema that the server has never seen, minus the same question's without one (p50).
3. Inter-token time of other requests: before anything arrives, while a question without a schema is answered, and
   while one with a new schema is.  The three take turns, ten times over: the others' answers grow meanwhile, and what
   that costs must not be held against whoever comes last.

Exit status 1 if an answer does not validate or a request fails; the times are for reading.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.structured_parts.measure import (
    ALONE,
    NUM_STREAMS,
    Asker,
    Results,
    check_answers,
    time_first_tokens,
    time_others,
)
from benchmarks.structured_parts.schemas import BY_HAND, schemas
from jaxserve.bench.environment import environment
from jaxserve.bench.http_client import HttpClient, TransportError
from jaxserve.bench.percentiles import percentile
from jaxserve.bench.server_process import server_at
from jaxserve.errors import JaxserveError

NUM_SCHEMAS = 200
NUM_FIRST_TOKENS = 40  # pairs of questions that are timed
NUM_ARRIVALS = 10


async def run(url: str, args: argparse.Namespace) -> Results:
    """All three parts."""
    client = HttpClient(f"{url.rstrip('/').removesuffix('/v1')}/v1")
    results = Results()
    try:
        response = await client.get("/models")
        if response.status != 200:
            raise TransportError(f"{client.url}/models answered {response.status}")
        asker = Asker(client, json.loads(response.body)["data"][0]["id"])
        count = min(args.limit, NUM_SCHEMAS)
        print(f"asking for {count} schemas", flush=True)
        await check_answers(asker, schemas(args.seed, count), results)
        # Of another seed, so that the server has not seen them.
        fresh = schemas(args.seed + 1, len(BY_HAND) + NUM_FIRST_TOKENS + NUM_ARRIVALS)[len(BY_HAND) :]
        timed = fresh[: min(args.limit, NUM_FIRST_TOKENS)]
        print(f"timing the first tokens of {len(timed)} new schemas", flush=True)
        await time_first_tokens(asker, timed, results)
        print(f"timing {NUM_STREAMS} other answers while {NUM_ARRIVALS} new schemas arrive", flush=True)
        await time_others(asker, fresh[NUM_FIRST_TOKENS:], results)
    finally:
        client.close()
    return results


def report(results: Results) -> dict[str, Any]:
    """Print tables; the same as a JSON object."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(Console().width, 120))
    stopped, valid = results.num_stopped, results.num_valid
    share = valid / stopped if stopped else 0.0
    table = Table("answers", "", title="JSON schemas")
    table.add_row(
        "ended by themselves / cut by max_tokens", f"{stopped} / {results.finish_reasons['length']}"
    )
    table.add_row("valid, of those that ended by themselves", f"{share:.1%} (must be 100 %)")
    table.add_row("failed or not valid", str(len(results.failures)))
    console.print(table)
    cost = 1000 * results.first_token_cost
    times = Table("time to first token, ms", "p50", "p90", title="a schema never seen before")
    for name, values in (
        ("without a schema", results.first_token),
        ("with it", results.first_token_new_schema),
    ):
        in_ms = sorted(1000 * value for value in values)
        times.add_row(name, f"{percentile(in_ms, 50):.1f}", f"{percentile(in_ms, 90):.1f}")
    times.add_row("more, pair by pair", f"{cost:+.1f} (aim: at most 50)", "")
    console.print(times)
    others = Table(title=f"{NUM_STREAMS} other answers")
    for heading in ("others' inter-token time", "p50, ms", "to before", "mean, ms", "to before"):
        others.add_column(heading)
    before = results.inter_token[ALONE]
    for name, gaps in results.inter_token.items():
        cells = []
        for average in (statistics.median, statistics.fmean):
            cells += [f"{1000 * average(gaps):.1f}", f"{average(gaps) / average(before) - 1:+.1%}"]
        others.add_row(name, *cells)
    others.caption = (
        "aim: p50 within 10 % of before; the mean has the steps in it that read the arrivals' prompts"
    )
    console.print(others)
    for failure in results.failures:
        console.print(failure, style="red", markup=False)
    return {
        "num_answers": results.finish_reasons.total(),
        "finish_reasons": dict(results.finish_reasons),
        "num_valid": valid,
        "valid_share_of_stopped": share,
        "failures": results.failures,
        "ttft_ms": {
            "p50_plain": 1000 * statistics.median(results.first_token),
            "p50_new_schema": 1000 * statistics.median(results.first_token_new_schema),
            "p50_difference": cost,
        },
        "inter_token_ms": {
            name: {"p50": 1000 * statistics.median(gaps), "mean": 1000 * statistics.fmean(gaps)}
            for name, gaps in results.inter_token.items()
        },
    }


def main() -> int:
    """Run the benchmark."""
    args = _parse()
    try:
        with server_at(args.base_url, args.model, args.serve_flag) as url:
            results = asyncio.run(run(url, args))
    except JaxserveError as error:
        print(f"structured: error: {error}", file=sys.stderr)
        return 1
    result = report(results)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({**environment(benchmark="structured", model=args.model), **result}, file, indent=2)
    passed = not results.failures and results.num_valid == results.num_stopped > 0
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/structured.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base-url", help="a running server (default: start one)")
    parser.add_argument("--model", default="smollm2", help="of the server to start (default: %(default)s)")
    parser.add_argument(
        "--serve-flag", action="append", default=[], help="of the server to start; may be repeated"
    )
    parser.add_argument(
        "--limit", type=int, default=NUM_SCHEMAS, help="schemas to ask for (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
