"""One model over two hosts, here two processes of four pretend CPU devices each: right answers, and a clean end.

    python benchmarks/multihost.py

SmolLM2 lies over all eight devices.  The second process starts first; the first one answers over HTTP what transformers
answered (the recorded goldens, greedy, float32).  Then the second is killed amid answers: /health must say so within
ten seconds and name it, every request in flight must fail at once, new ones must get 503, and the first process must
end when it is told to.  Prints PASS or FAIL; the exit status is 0 or 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from jaxserve.bench.server_process import free_port

GOLDENS = Path(__file__).parent.parent / "tests" / "data" / "goldens" / "smollm2.npz"
MODEL = "smollm2"
DEVICES_OF_A_HOST = 4
NUM_PROMPTS, NUM_TOKENS = 4, 32
NEAR_TIE = 1e-3  # gap in logits of the reference below which answers may part
START_SECONDS, HEALTH_SECONDS, FAIL_SECONDS, END_SECONDS = 600, 10, 10, 30
FLAGS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "8",
    "--max-num-batched-tokens",
    "128",
)


@dataclass(frozen=True)
class Golden:
    prompt_ids: list[int]
    token_ids: list[int]
    gaps: list[float]  # between the two likeliest tokens at each position


class CheckError(Exception):
    """Something is not as it should be."""


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        with ExitStack() as stack:
            run(stack)
    except (CheckError, httpx.HTTPError) as error:
        print(f"FAIL: {error}", flush=True)
        return 1
    print("PASS", flush=True)
    return 0


def run(stack: ExitStack) -> None:
    port = free_port()
    url, master_port = f"http://127.0.0.1:{port}", free_pair(port)
    follower = stack.enter_context(host(1, url, master_port))
    time.sleep(2)  # whoever is first waits
    leader = stack.enter_context(host(0, url, master_port))
    client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
    seconds = until_ready(client, (leader, follower))
    tell(f"ready after {seconds:.0f} s")
    check_goldens(client)
    check_loss(client, follower)
    begun = time.monotonic()
    leader.send_signal(signal.SIGTERM)
    try:
        leader.wait(END_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CheckError(f"the first process had not ended {END_SECONDS} s after SIGTERM") from error
    tell(
        f"the first process ended {time.monotonic() - begun:.1f} s after SIGTERM, with status {leader.returncode}"
    )
    if leader.returncode != 1:
        raise CheckError("a server that cannot go on ends with status 1")


def free_pair(taken: int) -> int:
    """A port that is free and has a free one behind it, neither of which is `taken`."""
    while True:
        port = free_port()
        if taken in (port, port + 1):
            continue
        try:
            socket.create_server(("", port + 1)).close()
        except OSError:
            continue
        return port


@contextmanager
def host(rank: int, url: str, master_port: int) -> Iterator[subprocess.Popen[bytes]]:
    """One of the two processes; what it says is shown where it fails."""
    pretend = f"--xla_force_host_platform_device_count={DEVICES_OF_A_HOST}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {pretend}",
        "NPROC": "16",  # threads: fewer than executions that wait for each other are a deadlock
    }
    command = [
        *(sys.executable, "-m", "jaxserve", "serve", MODEL, *FLAGS),
        *("--tensor-parallel-size", f"{2 * DEVICES_OF_A_HOST}", "--nnodes", "2", "--node-rank", f"{rank}"),
        *("--master-addr", "127.0.0.1", "--master-port", f"{master_port}", "--port", url.rpartition(":")[2]),
    ]
    with tempfile.NamedTemporaryFile(prefix=f"jaxserve-host-{rank}-", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process
        except CheckError:
            print(
                f"--- what node_rank {rank} said last",
                *Path(log.name).read_text().splitlines()[-15:],
                sep="\n",
            )
            raise
        finally:
            process.kill()
            process.wait()


def until_ready(client: httpx.Client, processes: tuple[subprocess.Popen[bytes], ...]) -> float:
    begun = time.monotonic()
    while time.monotonic() < begun + START_SECONDS:
        if any(process.poll() is not None for process in processes):
            raise CheckError("a process ended before the server was ready")
        try:
            if client.get("/health").status_code == 200:
                return time.monotonic() - begun
        except httpx.TransportError:
            pass  # nobody listens yet
        time.sleep(0.5)
    raise CheckError(f"the server was not ready within {START_SECONDS} s")


def check_goldens(client: httpx.Client) -> None:
    goldens = read_goldens()
    with ThreadPoolExecutor(len(goldens)) as pool:
        answers = list(pool.map(lambda golden: answer(client, golden.prompt_ids), goldens))
    for number, (golden, token_ids) in enumerate(zip(goldens, answers, strict=True)):
        parted = next(
            (i for i, (a, b) in enumerate(zip(token_ids, golden.token_ids, strict=False)) if a != b), None
        )
        if parted is not None and golden.gaps[parted] >= NEAR_TIE:
            raise CheckError(f"answer {number} parts from the recorded one at token {parted}: {token_ids}")
    tell(f"{len(goldens)} answers of {NUM_TOKENS} tokens are the recorded ones")


def read_goldens() -> list[Golden]:
    """Of the recorded prompts, those of the beginning."""
    with np.load(GOLDENS, allow_pickle=False) as data:
        ends = np.cumsum(data["prompt_lengths"])
        return [
            Golden(
                data["prompt_ids"][ends[i] - data["prompt_lengths"][i] : ends[i]].tolist(),
                data["token_ids"][i][:NUM_TOKENS].tolist(),
                data["gaps"][i].tolist(),
            )
            for i in range(NUM_PROMPTS)
        ]


def answer(client: httpx.Client, prompt_ids: list[int]) -> list[int]:
    body = {
        "model": MODEL,
        "prompt": prompt_ids,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise CheckError(f"a completion got {response.status_code}: {response.text}")
    return response.json()["choices"][0]["token_ids"]


def check_loss(client: httpx.Client, follower: subprocess.Popen[bytes]) -> None:
    """Kill the follower amid answers, streamed and whole."""
    with ThreadPoolExecutor(2) as pool:
        in_flight = [pool.submit(ended, client, stream=stream) for stream in (True, False)]
        time.sleep(3)
        if any(future.done() for future in in_flight):
            raise CheckError("the answers ended before the follower was killed")
        follower.kill()
        killed = time.monotonic()
        while (health := client.get("/health")).status_code == 200:
            if time.monotonic() > killed + HEALTH_SECONDS:
                raise CheckError(f"/health was still 200 {HEALTH_SECONDS} s after the follower was killed")
            time.sleep(0.05)
        tell(
            f"/health said after {time.monotonic() - killed:.2f} s: {health.status_code} {message_of(health)}"
        )
        if health.status_code != 503 or "node_rank 1" not in message_of(health):
            raise CheckError("/health does not name the follower")
        for future in in_flight:
            moment, how = future.result()
            tell(f"a request in flight ended after {moment - killed:.2f} s: {how}")
            if moment - killed > FAIL_SECONDS or "node_rank 1" not in how:
                raise CheckError("it did not fail at once, or not with a message that names the follower")
    late = client.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 1})
    tell(f"a new request got {late.status_code} {message_of(late)}")
    if late.status_code != 503 or "Retry-After" not in late.headers:
        raise CheckError("a new request did not get 503 with Retry-After")


def ended(client: httpx.Client, *, stream: bool) -> tuple[float, str]:
    """When and how a long request ended that cannot be answered."""
    body = {
        "model": MODEL,
        "prompt": "Once upon a time",
        "max_tokens": 480,
        "ignore_eos": True,
        "stream": stream,
    }
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    data = [line.removeprefix("data: ") for line in lines if line != "data: [DONE]"]
    last = json.loads(data[-1])
    how = last["error"]["message"] if "error" in last else "it was answered"
    return time.monotonic(), f"{'stream' if stream else response.status_code}: {how}"


def message_of(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


def tell(what: str) -> None:
    print(what, flush=True)


if __name__ == "__main__":
    sys.exit(main())
