"""How much slower the first named tool call after a server's start is than the hundredth.

    python benchmarks/first_tool_call.py                                  # SmolLM2
    python benchmarks/first_tool_call.py --model qwen2.5-coder-0.5b

Starts `jaxserve serve` and sends one request after the other, each with the same tool and tool_choice naming it.
What the first one finds cold would be its grammar, the mask programs, the chat template and Python's own first times.
No prompt shares a prefix with another one (a number comes first in each), so that the prefix cache does not
favour the later ones; all have the same number of tokens.  The connection is open before the first request.

Whole answers are timed, and streamed ones in turn with them: until the first piece of the call.  Times mean something
on a machine that does nothing else; the server's processor time for each call (Linux) says what it does elsewhere.
Needs the server's packages and nothing else.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.bench.environment import environment
from jaxserve.bench.server_process import ServerProcess
from jaxserve.cli.quantities import positive

AIM_MS = 50.0  # that the first call may be slower than the last one

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather forecast for a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo", "Bern", "Lima"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "details": {
                    "type": "array",
                    "items": {"enum": ["wind", "rain", "sun", "humidity"]},
                    "minItems": 2,
                    "maxItems": 2,
                },
            },
            "required": ["city", "unit", "details"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Call:
    """One request's times, in milliseconds, and sizes."""

    first_ms: float | None  # until the first piece of the call; None: not streamed
    whole_ms: float
    cpu_ms: float | None  # of the server's process, in steps of 10 ms or so; None: cannot be told here
    num_prompt_tokens: int
    num_tokens: int


class Client:
    """One connection to the server, open from the beginning."""

    def __init__(self, server: ServerProcess) -> None:
        self._pid = server.pid
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        self._connection.request("GET", "/v1/models")
        self._model = json.loads(self._connection.getresponse().read())["data"][0]["id"]

    def call(self, number: int, *, is_streamed: bool) -> Call:
        """Ask for a call and time it."""
        body = {
            "model": self._model,
            "messages": [
                {"role": "system", "content": f"{number:06} is the number of this conversation."},
                {"role": "user", "content": "What is the weather in Rome in celsius? I want wind and rain."},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            "temperature": 0,
            "max_tokens": 100,
            "stream": is_streamed,
            **({"stream_options": {"include_usage": True}} if is_streamed else {}),
        }
        data = json.dumps(body).encode()
        cpu_before = _cpu_ms(self._pid)
        start = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        if response.status != 200:
            sys.exit(f"the server answered {response.status}: {response.read().decode()[:500]}")
        read = _streamed if is_streamed else _whole
        first_ms, usage, arguments = read(response, start)
        whole_ms = (time.perf_counter() - start) * 1000
        cpu_after = _cpu_ms(self._pid)
        cpu_ms = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
        if set(json.loads(arguments)) != {"city", "unit", "details"}:
            sys.exit(f"the call does not follow its schema: {arguments}")
        return Call(first_ms, whole_ms, cpu_ms, usage["prompt_tokens"], usage["completion_tokens"])


def _cpu_ms(pid: int) -> float | None:
    """Processor time of a process and its threads so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def _whole(response: http.client.HTTPResponse, start: float) -> tuple[None, dict[str, Any], str]:
    answer = json.loads(response.read())
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    return None, answer["usage"], call["function"]["arguments"]


def _streamed(response: http.client.HTTPResponse, start: float) -> tuple[float | None, dict[str, Any], str]:
    first_ms, usage, arguments = None, {}, ""
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            for piece in choice["delta"].get("tool_calls", ()):
                first_ms = first_ms or (time.perf_counter() - start) * 1000
                arguments += piece["function"].get("arguments", "")
    return first_ms, usage, arguments


def measure(
    model: str, flags: list[str], num_calls: int, start_number: int, *, is_streamed: bool
) -> list[Call]:
    """The calls of one server, from its start on."""
    all_flags = [
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--disable-log-requests",
        *flags,
    ]
    with ServerProcess(model, all_flags) as server:
        client = Client(server)
        return [client.call(start_number + number, is_streamed=is_streamed) for number in range(num_calls)]


def summary(calls: list[Call]) -> dict[str, Any]:
    """The times of one server's calls that matter, in milliseconds."""
    times = [call.whole_ms if call.first_ms is None else call.first_ms for call in calls]
    return {
        "timed": "whole answer" if calls[0].first_ms is None else "first piece of the call",
        "first_ms": times[0],
        "second_ms": times[1],
        "median_of_last_ten_ms": statistics.median(times[-10:]),
        "last_ms": times[-1],
        "first_minus_last_ms": times[0] - times[-1],
        "first_minus_median_ms": times[0] - statistics.median(times[-10:]),
        "num_calls": len(calls),
        "num_prompt_tokens": sorted({call.num_prompt_tokens for call in calls}),
        "num_tokens": sorted({call.num_tokens for call in calls}),
        "times_ms": times,
        "cpu_ms": [call.cpu_ms for call in calls],
        "first_cpu_minus_median_ms": _over_median([call.cpu_ms for call in calls]),
    }


def _over_median(times: list[float | None]) -> float | None:
    """How much the first one is above the last ten's median."""
    first, *rest = times
    last = [given for given in rest[-10:] if given is not None]
    return None if first is None or not last else first - statistics.median(last)


def main() -> int:
    """Start servers, measure, print a table."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/first_tool_call.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2", help="(default: %(default)s)")
    add("--calls", type=positive, default=100, help="to each server (default: %(default)s)")
    add(
        "--starts",
        type=positive,
        default=2,
        help="servers of each kind, one after the other (default: %(default)s)",
    )
    add("--output", type=Path, metavar="FILE.json", help="write the result here")
    args, flags = parser.parse_known_args()
    if args.calls < 10:
        parser.error("--calls must be at least 10")
    rows = []
    print(
        f"{'ms':24} {'first':>9} {'second':>9} {'last':>9} {'median 10':>9} {'first - last':>13} {'cpu':>7}"
    )
    for start in range(2 * args.starts):
        number = start * args.calls  # compiled programs are on disk from the first start on; prompts are not
        row = summary(measure(args.model, flags, args.calls, number, is_streamed=start % 2 == 1))
        rows.append(row)
        cpu = row["first_cpu_minus_median_ms"]
        print(
            f"{row['timed']:24} {row['first_ms']:9.1f} {row['second_ms']:9.1f} {row['last_ms']:9.1f} "
            f"{row['median_of_last_ten_ms']:9.1f} {row['first_minus_last_ms']:13.1f} "
            f"{'' if cpu is None else f'{cpu:+.0f}':>7}",
            flush=True,
        )
    worst = max(row["first_minus_last_ms"] for row in rows)
    is_reached = worst <= AIM_MS
    print("cpu: the server's processor time for the first call, above the median of the last ten")
    print(
        f"first minus last at most {worst:.1f} ms: the aim of {AIM_MS:g} ms is {'' if is_reached else 'not '}reached"
    )
    if args.output:
        result = {
            "model": args.model,
            "flags": flags,
            "environment": environment(),
            "aim_ms": AIM_MS,
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
