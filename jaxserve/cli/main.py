"""The `jaxserve` command: parses the command line and hands it to one of the commands."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from jaxserve import __version__
from jaxserve.cli import bench, chat, convert, generate, plan, serve, toolcheck
from jaxserve.cli.config_file import apply_config_file
from jaxserve.cli.one_host import run_on_host
from jaxserve.cli.vllm_flags import NEEDLESS, REFUSED, see_dotted, told
from jaxserve.errors import ConfigError, JaxserveError

EXIT_FAILED = 1
EXIT_USAGE = 2  # also what argparse exits with
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.  Errors made on purpose are one line on stderr."""
    try:
        try:
            status = _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit:  # argparse's: it has said all
            _flush()
            raise
        _flush()
        return status
    except BrokenPipeError:
        # The reader of our output went away (`jaxserve … | head`): nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line, with `run` set to the chosen command's function.

    Raises ConfigError with everything in it that cannot be, a line each.
    """
    argv = [_dashed(argument) for argument in argv]
    parser, commands = build_parser()
    chosen = _chosen_command(argv, commands)
    if chosen is not None:
        apply_config_file(*chosen)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        unknown = see_dotted(args, unknown, chosen[0] if chosen else parser)
    wrong = told(args, REFUSED)
    if unknown:
        wrong = [*wrong, _unknown_message(unknown, chosen[0] if chosen else parser)]
    if wrong:
        raise ConfigError("\n  ".join(wrong if len(wrong) == 1 else ["this cannot be:", *wrong]))
    return args


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and the parser of each command by name (`bench serve` has two words)."""
    parser = argparse.ArgumentParser(
        prog="jaxserve", description="Serve large language models with JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"jaxserve {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}
    for module in (serve, chat, generate, convert, plan, bench, toolcheck):
        commands.update(module.add_parser(subparsers))
    return parser, commands


def _run(arguments: Sequence[str]) -> int:
    try:
        args = parse(arguments)
        for note in told(args, NEEDLESS):
            print(f"jaxserve: {note}", file=sys.stderr)
        if getattr(args, "nnodes", 1) > 1:
            return run_on_host(lambda: args.run(args))
        return args.run(args)
    except ConfigError as error:
        return _fail(error, EXIT_USAGE)
    except JaxserveError as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _flush() -> None:
    """Write what was printed while a reader that has gone can be told from an error; at exit it cannot."""
    print(end="", flush=True)  # stdout may be closed, and then is None


def _dashed(argument: str) -> str:
    """A flag as it is spelled here: --max_model_len is --max-model-len, as in vLLM."""
    name, sign, value = argument.partition("=")
    return name.replace("_", "-") + sign + value if name.startswith("--") else argument


def _chosen_command(
    argv: Sequence[str], commands: dict[str, argparse.ArgumentParser]
) -> tuple[argparse.ArgumentParser, Sequence[str]] | None:
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in commands:
            return commands[name], argv[words:]
    return None


def _unknown_message(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    known = [option for action in parser._actions for option in action.option_strings]  # no public list
    parts = []
    for argument in unknown:
        near = difflib.get_close_matches(argument.split("=")[0], known, n=1)
        parts.append(f"{argument} (did you mean {near[0]}?)" if near else argument)
    return f"unknown arguments: {', '.join(parts)}; `{parser.prog} --help` lists what there is"


def _fail(error: JaxserveError, status: int) -> int:
    print(f"jaxserve: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
