"""`jaxserve bench latency | throughput | serve`: measure, print a table, write JSON."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from jaxserve.cli.config_file import add_config_flag
from jaxserve.cli.engine_flags import add_engine_flags, add_model_argument, engine_argv, engine_config
from jaxserve.cli.quantities import count, counts, positive, rate
from jaxserve.errors import ConfigError

HTTP_CHATS = (1, 8)  # concurrent chats that `bench throughput --http` measures


def add_parser(subparsers: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the command and its three subcommands; returns their parsers by name."""
    parser = subparsers.add_parser(
        "bench", allow_abbrev=False, help="measure latency, throughput, or a running server"
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    return {
        "bench": parser,
        "bench latency": _add_latency(kinds),
        "bench throughput": _add_throughput(kinds),
        "bench serve": _add_serve(kinds),
    }


def _add_latency(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser("latency", allow_abbrev=False, help="how long one batch takes, in this process")
    add_model_argument(parser)
    add_config_flag(parser)
    add = parser.add_argument
    add("--batch-size", type=positive, default=8, help="default: %(default)s")
    add("--input-len", type=positive, default=32, metavar="TOKENS", help="default: %(default)s")
    add("--output-len", type=positive, default=128, metavar="TOKENS", help="default: %(default)s")
    add("--iterations", "--num-iters", type=positive, default=10, help="default: %(default)s")
    add("--warmup-iterations", "--num-iters-warmup", type=count, default=2, help="default: %(default)s")
    _add_output(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run_latency)
    return parser


def _add_throughput(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "throughput",
        allow_abbrev=False,
        help="tokens per second at given batch sizes, beside transformers if asked",
    )
    add_model_argument(parser)
    add_config_flag(parser)
    add = parser.add_argument
    add("--batch-size", type=counts, default=[1, 8], metavar="N,N,…", help="default: 1,8")
    add("--input-len", type=positive, default=128, metavar="TOKENS", help="default: %(default)s")
    add("--output-len", type=positive, default=128, metavar="TOKENS", help="default: %(default)s")
    add(
        "--repeats",
        type=positive,
        default=3,
        help="runs of each batch, of which the median counts (default: %(default)s)",
    )
    add(
        "--vs",
        choices=("transformers",),
        help="run the same batches with this engine too, turn and turn about",
    )
    add(
        "--vs-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter that has torch (default: this one)",
    )
    add(
        "--http",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure the HTTP server with 1 and 8 chats as well (default: with --vs)",
    )
    _add_output(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run_throughput)
    return parser


def _add_serve(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "serve",
        allow_abbrev=False,
        help="load on a running server, ours or any with the OpenAI API",
        description="Send load to a running server. Without --request-rate it is a closed loop of "
        "--max-concurrency requests; with it, requests arrive at random (Poisson), answered or not.",
    )
    add_config_flag(parser)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="with or without /v1 (default: %(default)s)")
    add("--model", help="name at the server (default: the first that it lists)")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="default: %(default)s")
    add("--num-prompts", type=positive, default=100, help="default: %(default)s")
    add("--max-concurrency", type=positive, help="requests under way at most (default: no limit)")
    add(
        "--request-rate", type=rate, default=math.inf, metavar="PER_SECOND", help="default: inf (all at once)"
    )
    add(
        "--burstiness",
        type=rate,
        default=1.0,
        help="1 is Poisson, below 1 bursts, above 1 even (default: %(default)s)",
    )
    add(
        "--random-input-len",
        "--input-len",
        type=positive,
        default=512,
        metavar="TOKENS",
        help="default: %(default)s",
    )
    add(
        "--random-output-len",
        "--output-len",
        type=positive,
        default=128,
        metavar="TOKENS",
        help="default: %(default)s",
    )
    add(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths vary by ±R times (default: 0)",
    )
    add(
        "--random-prefix-len",
        type=count,
        default=0,
        metavar="TOKENS",
        help="tokens that all prompts begin with",
    )
    add(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="JSONL with `prompt` or `messages`, or ShareGPT JSON",
    )
    add("--dataset-output-len", type=positive, metavar="TOKENS", help="overrides max_tokens of the dataset")
    add("--tokenizer", metavar="NAME", help="counts prompt tokens (default: the server's /tokenize)")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="default: on, off for a dataset",
    )
    add("--temperature", type=float, default=0.0, help="default: %(default)s")
    add(
        "--num-warmups", type=count, default=1, help="requests before the clock starts (default: %(default)s)"
    )
    add(
        "--timeout", type=rate, default=600.0, metavar="SECONDS", help="of one request (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    add("--api-key", help="default: $OPENAI_API_KEY")
    add("--disable-tqdm", action="store_true", help="no progress bar")
    _add_output(parser)
    parser.set_defaults(run=run_serve)
    return parser


def run_latency(args: argparse.Namespace) -> int:
    """Measure in this process."""
    from jaxserve.bench import latency
    from jaxserve.bench.environment import environment
    from jaxserve.bench.report import write_json

    result = latency.run_latency(
        engine_config(args),
        batch_size=args.batch_size,
        input_len=args.input_len,
        output_len=args.output_len,
        iterations=args.iterations,
        warmup_iterations=args.warmup_iterations,
        say=_say,
    )
    latency.print_latency(result)
    write_json(args.output, environment(benchmark="latency", **result))
    return 0


def run_throughput(args: argparse.Namespace) -> int:
    """Measure, every engine and the HTTP server in a process of its own."""
    from functools import partial

    from jaxserve.bench import throughput
    from jaxserve.bench.environment import environment
    from jaxserve.bench.report import write_json

    config = engine_config(args)
    make_peer = None
    if args.vs == "transformers":
        from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
        from jaxserve.loading.resolve import open_checkpoint

        throughput.check_transformers(args.vs_python)
        checkpoint = open_checkpoint(config.model, config.load_format, config.revision)
        if isinstance(checkpoint, OrbaxCheckpoint):
            raise ConfigError(
                f"--vs transformers: {config.model} was converted, which transformers cannot read; give the original"
            )
        path = checkpoint.path
        make_peer = partial(throughput.transformers_worker, path, python=args.vs_python)
    spec = throughput.ThroughputSpec(
        batch_sizes=args.batch_size,
        input_len=args.input_len,
        output_len=args.output_len,
        repeats=args.repeats,
    )
    result = throughput.run_throughput(throughput.jaxserve_worker(config), make_peer, spec, _say)
    if args.http or (args.http is None and args.vs):
        result["http"] = throughput.run_http(config.model, engine_argv(config), HTTP_CHATS, spec, _say)
    throughput.print_throughput(result)
    write_json(args.output, environment(benchmark="throughput", **result))
    return 0


def run_serve(args: argparse.Namespace) -> int:
    """Send load; 1 if any request failed."""
    from jaxserve.bench.environment import environment
    from jaxserve.bench.report import print_load_report, write_json
    from jaxserve.bench.serve_bench import LoadSpec, run_load

    if not 0 <= args.random_range_ratio < 1:
        raise ConfigError(f"--random-range-ratio {args.random_range_ratio}: must be at least 0 and below 1")
    ignore_eos = args.ignore_eos if args.ignore_eos is not None else args.dataset_path is None
    spec = LoadSpec(
        base_url=args.base_url,
        model=args.model,
        api=args.endpoint,
        num_prompts=args.num_prompts,
        input_len=args.random_input_len,
        output_len=args.random_output_len,
        range_ratio=args.random_range_ratio,
        shared_prefix_len=args.random_prefix_len,
        dataset_path=args.dataset_path,
        dataset_output_len=args.dataset_output_len,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        num_warmups=args.num_warmups,
        tokenizer=args.tokenizer,
        ignore_eos=ignore_eos,
        temperature=args.temperature,
        seed=args.seed,
        timeout=args.timeout,
        api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
        show_progress=not args.disable_tqdm,
    )
    metrics = run_load(spec)
    arrivals = "closed loop" if math.isinf(args.request_rate) else f"{args.request_rate:g} requests/s"
    limit = f", {args.max_concurrency} at most" if args.max_concurrency else ""
    print_load_report(f"{metrics['model']} at {args.base_url}: {arrivals}{limit}", metrics)
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "api_key", "config")}
    settings |= {"request_rate": str(args.request_rate), "output": str(args.output or "")}
    settings["dataset_path"] = str(args.dataset_path or "")
    write_json(args.output, environment(benchmark="serve", settings=settings, **metrics))
    return 1 if metrics["failed"] else 0


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", "--output-json", type=Path, metavar="FILE.json", help="write the result here"
    )


def _say(text: str) -> None:
    """Progress goes to stderr; stdout has the result."""
    print(text, file=sys.stderr, flush=True)
