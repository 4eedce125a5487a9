"""The flags that say how answers are sampled, shared by `generate` and `chat`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxserve.cli.quantities import positive


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add sampling flags; one that is not given leaves the choice to the model's own defaults."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--temperature", type=float, help="0 always takes the most likely token")
    add("--top-p", type=float)
    add("--top-k", type=int)
    add("--min-p", type=float)
    add("--presence-penalty", type=float)
    add("--frequency-penalty", type=float)
    add("--repetition-penalty", type=float)
    add("--sampling-seed", type=int, metavar="SEED", help="the same seed gives the same answer")
    add(
        "--max-tokens",
        type=positive,
        default=max_tokens,
        help="length of an answer at most (default: %(default)s)",
    )
    add("--stop", action="append", metavar="TEXT", help="end an answer at this text; may be repeated")
    add("--ignore-eos", action="store_true", help="do not end at the model's end token")


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given, in the names of SamplingParams and of the OpenAI API."""
    fields = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.sampling_seed,
        "max_tokens": args.max_tokens,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos or None,
    }
    return {name: value for name, value in fields.items() if value is not None}
