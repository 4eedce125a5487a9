"""Flags of vLLM's that we do not have: each is known, and refused or taken with a word why."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from jaxserve.vllm_options import VllmOption

# Attributes of a parsed command line: what is to be told of each kind.
REFUSED, NEEDLESS = "vllm_refused", "vllm_needless"


def add_vllm_flags(parser: argparse.ArgumentParser, options: Sequence[VllmOption]) -> None:
    """Make `parser` know `options`, out of sight of --help."""
    for option in options:
        for flag in option.flags:
            negative = (f"--no-{flag[2:]}",) if option.is_switch else ()
            parser.add_argument(flag, *negative, action=VllmFlag, option=option)


def told(namespace: argparse.Namespace, kind: str) -> list[str]:
    """What parsing found to tell, REFUSED or NEEDLESS."""
    return getattr(namespace, kind, [])


class VllmFlag(argparse.Action):
    """Notes what is to be told of a flag where it stands on the command line."""

    def __init__(self, option_strings: Sequence[str], dest: str, option: VllmOption, **kwargs: Any) -> None:
        super().__init__(
            option_strings,
            dest,
            nargs=0 if option.is_switch else None,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            **kwargs,
        )
        self.option = option

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        flag = option_string or self.option_strings[0]
        if self.option.is_switch:
            self.see(namespace, not flag.startswith("--no-"), flag)
        else:
            self.see(namespace, values, f"{flag} {values}")

    def see(self, namespace: argparse.Namespace, value: object, said: str) -> None:
        """Note what is to be told of `value`, for which somebody has `said` that."""
        if not self.option.asks_for_nothing(value):
            kind = NEEDLESS if self.option.is_needless else REFUSED
            setattr(namespace, kind, [*told(namespace, kind), self.option.sentence(said)])


def see_dotted(
    namespace: argparse.Namespace, unknown: Sequence[str], parser: argparse.ArgumentParser
) -> list[str]:
    """Note what is to be told of unknown arguments that set a part of a flag, as in vLLM: -cc.mode 3; the others."""
    flags = parser._option_string_actions  # no public table
    rest, i = [], 0
    while i < len(unknown):
        name, _, given = unknown[i].partition("=")
        action = flags.get(name.partition(".")[0]) if name.startswith("-") and "." in name else None
        i += 1
        if action is None:
            rest.append(unknown[i - 1])
            continue
        if not given and i < len(unknown) and not unknown[i].startswith("-"):
            given, i = unknown[i], i + 1
        said = f"{name} {given}".rstrip()
        if isinstance(action, VllmFlag):
            action.see(namespace, given, said)
        else:
            sentence = f"{said}: not supported; give {name.partition('.')[0]} the whole JSON object"
            setattr(namespace, REFUSED, [*told(namespace, REFUSED), sentence])
    return rest


def environment_note() -> str | None:
    """What to tell of vLLM's variables in the environment but the one that is read, VLLM_API_KEY."""
    names = sorted(name for name in os.environ if name.startswith("VLLM_") and name != "VLLM_API_KEY")
    return f"not read: {', '.join(names)}; flags say everything" if names else None
