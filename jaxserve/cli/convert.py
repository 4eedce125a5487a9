"""`jaxserve convert`: a checkpoint in jaxserve's own layout, which loads fast and into any mesh."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from jaxserve.cli.engine_flags import MODEL_HELP
from jaxserve.config import Dtype


def add_parser(subparsers: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the command; returns its parser by name."""
    parser = subparsers.add_parser(
        "convert", allow_abbrev=False, help="write a model as an Orbax checkpoint, which loads faster"
    )
    add = parser.add_argument
    add("source", metavar="SRC", help=f"what to convert: {MODEL_HELP}")
    add("destination", metavar="DST", type=Path, help="directory to write; `jaxserve serve DST` serves it")
    add(
        "--dtype",
        choices=("auto", *get_args(Dtype)),
        default="auto",
        help="of the weights on disk (default: as they are in SRC; quantised ones become float32)",
    )
    add("--tokenizer", metavar="PATH", help="take the tokenizer from here rather than from SRC")
    add("--overwrite", action="store_true", help="replace the converted checkpoint that is in DST")
    parser.set_defaults(run=run)
    return {"convert": parser}


def run(args: argparse.Namespace) -> int:
    """Convert; what is interrupted goes on when it is run again."""
    from jaxserve.conversion.convert import convert

    try:
        done = convert(
            args.source,
            args.destination.expanduser(),
            dtype=None if args.dtype == "auto" else args.dtype,
            tokenizer=args.tokenizer,
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        print("interrupted: what was written is kept, run it again to go on", file=sys.stderr)
        raise
    size = f"{done.num_bytes / 1e9:.2f} GB of {' and '.join(done.dtypes)}"
    print(f"{done.path}: {done.family}, {done.num_parameters / 1e6:,.0f} million parameters, {size}")
    if done.is_dequantized and args.dtype == "auto":
        print("the weights were quantised; --dtype bfloat16 would take half of that", file=sys.stderr)
    return 0
