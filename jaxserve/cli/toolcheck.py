"""`jaxserve toolcheck`: replays answers through a tool parser, streamed and not, cut in every way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.server.toolcheck.subjects import Subject
    from jaxserve.server.toolcheck.texts import Sample
    from jaxserve.text.tokenizer import Tokenizer

EXIT_DIFFERS = 1


def add_parser(subparsers: Any) -> dict[str, argparse.ArgumentParser]:
    """Add the command; returns its parser by name."""
    parser = subparsers.add_parser(
        "toolcheck",
        allow_abbrev=False,
        help="check that a tool parser says the same streamed and not",
        description="Gives answers to a tool parser whole, token by token, cut in two at every token, cut at random, "
        "and cut off after every token, and compares what it says with what it says when nothing is streamed. "
        "Prints the first difference, and exits with 1 then. Needs no model.",
    )
    add = parser.add_argument
    add(
        "names", nargs="*", metavar="NAME", help="tool parsers (default: the plug-in's, or all built-in ones)"
    )
    add("--plugin", metavar="FILE", help="Python file with tool parsers written for vLLM")
    add("--texts", metavar="FILE", help='answers: one a line, or JSON (texts, or {"text": …, "tools": […]})')
    add(
        "--tokenizer",
        metavar="PATH",
        help="a directory or .gguf file; answers are cut at its tokens (default: at bytes and a parser's own tags)",
    )
    add("--exact", action="store_true", help="a plug-in's arguments must be the same text, not the same JSON")
    add("--seed", type=int, default=0, help="of the random cuts (default: %(default)s)")
    add("--disable-tqdm", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)
    return {"toolcheck": parser}


def run(args: argparse.Namespace) -> int:
    """Check; 1 if a parser says different things.  ConfigError for what cannot be checked."""
    from jaxserve.server.plugins.load import load_plugin
    from jaxserve.server.tool_parsers.registry import TOOL_FORMATS
    from jaxserve.server.toolcheck.subjects import BuiltIn, plugin_subjects
    from jaxserve.server.toolcheck.texts import read_samples, samples_for

    tokenizer = _tokenizer(args.tokenizer)
    given = None if args.texts is None else read_samples(args.texts)
    if args.plugin is not None:
        subjects = plugin_subjects(load_plugin(args.plugin), args.names, tokenizer, exact=args.exact)
        checks: list[tuple[Subject, list[Sample]]] = [(each, given or samples_for(None)) for each in subjects]
    else:
        names = args.names or sorted({entry.names[0] for entry in TOOL_FORMATS.values()})
        checks = [
            (BuiltIn(name, tokenizer), given or samples_for(TOOL_FORMATS[name].names[0])) for name in names
        ]
    results = [_check(*each, seed=args.seed, is_shown=not args.disable_tqdm) for each in checks]
    return 0 if all(results) else EXIT_DIFFERS


def _check(subject: Subject, samples: Sequence[Sample], *, seed: int, is_shown: bool) -> bool:
    """Check one parser and say how it went; whether it says the same always."""
    from tqdm import tqdm

    from jaxserve.server.toolcheck.replay import check, num_planned
    from jaxserve.server.toolcheck.report import report

    total = num_planned(subject, samples)
    with tqdm(
        total=total, desc=subject.name, unit=" replays", leave=False, disable=None if is_shown else True
    ) as bar:
        findings = check(subject, samples, seed, bar.update)
    if findings.divergence is not None:
        print(report(subject.name, findings.divergence))
        return False
    print(
        f"{subject.name}: {len(samples)} answers with {findings.num_calls} calls in {findings.num_replays:,} replays: "
        "streamed and not streamed are the same"
    )
    if not findings.num_calls:
        print(
            f"{subject.name}: none of the answers has a call that this parser finds; give some by --texts",
            file=sys.stderr,
        )
    return True


def _tokenizer(path: str | None) -> Tokenizer | None:
    from jaxserve.text.tokenizer import load_tokenizer

    return None if path is None else load_tokenizer(path)
