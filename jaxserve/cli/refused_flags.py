"""Flags of vLLM that mean something we do not do yet: recognised, and refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RefusedFlag:
    """A flag, the values that ask for nothing (and pass), and what to do instead of it."""

    names: tuple[str, ...]
    instead: str
    harmless: tuple[str, ...] = ()

    def check(self, value: object) -> None:
        """Raise ConfigError unless `value` asks for nothing."""
        shown = "" if value is None else f" {value}"
        if value is None or str(value).lower() not in self.harmless:
            raise ConfigError(f"{self.names[0]}{shown}: not supported; {self.instead}")


_NO_STAGES = "every device has a part of every layer (--tensor-parallel-size); leave it out (or give 1)"
_LORA = "LoRA adapters are not served yet: merge the adapter into the weights first"

ENGINE_FLAGS: tuple[RefusedFlag, ...] = (
    RefusedFlag(
        ("--quantization", "-q"),
        "weights run in --dtype; a quantised GGUF file is dequantised when it is loaded",
        ("none",),
    ),
    RefusedFlag(("--pipeline-parallel-size", "-pp"), _NO_STAGES, ("1",)),
    RefusedFlag(("--speculative-config",), "there is no speculative decoding yet; leave it out"),
    RefusedFlag(("--cpu-offload-gb",), "weights stay on the device; leave it out", ("0", "0.0")),
    RefusedFlag(("--swap-space",), "preempted sequences are recomputed, not swapped; leave it out", ("0",)),
    RefusedFlag(("--num-gpu-blocks-override",), "give --kv-cache-memory instead"),
    RefusedFlag(("--enforce-eager",), "every step is compiled ahead of time; leave it out", ("false",)),
    RefusedFlag(("--trust-remote-code",), "code from checkpoints is never run; leave it out", ("false",)),
    RefusedFlag(("--enable-lora",), _LORA, ("false",)),
    RefusedFlag(("--lora-modules",), _LORA),
    RefusedFlag(("--revision",), "give a directory that holds the revision you want"),
    RefusedFlag(
        ("--tokenizer-mode",), "the Hugging Face tokenizer is used; leave it out (or give auto)", ("auto",)
    ),
    RefusedFlag(
        ("--mm-processor-cache-gb",), "prepared images are not kept; leave it out (or give 0)", ("0",)
    ),
    RefusedFlag(("--mm-encoder-tp-mode",), "the vision tower is laid out like the model; leave it out"),
    RefusedFlag(("--media-io-kwargs",), "images are decoded in one way; leave it out", ("{}",)),
    RefusedFlag(
        ("--enable-mm-embeds",), "images are taken, not embeddings of them; leave it out", ("false",)
    ),
    RefusedFlag(
        ("--interleave-mm-strings",), "images stay where they are among the texts; leave it out", ("true",)
    ),
    RefusedFlag(("--hf-overrides",), "edit config.json in a copy of the model instead"),
)

SERVER_FLAGS: tuple[RefusedFlag, ...] = (
    RefusedFlag(("--api-server-count",), "one process serves HTTP; leave it out (or give 1)", ("1",)),
    RefusedFlag(
        ("--headless",), "the engine and its HTTP front end run in one process; leave it out", ("false",)
    ),
)


def add_refused_flags(parser: argparse.ArgumentParser, flags: Sequence[RefusedFlag]) -> None:
    """Make `parser` know `flags`, out of sight of --help, so that each is refused by its own name."""
    for flag in flags:
        parser.add_argument(*flag.names, action=Refuse, refused=flag)


class Refuse(argparse.Action):
    """Checks the value where the flag stands on the command line."""

    def __init__(self, option_strings: Sequence[str], dest: str, refused: RefusedFlag, **kwargs: Any) -> None:
        super().__init__(
            option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs
        )
        self.refused = refused

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        self.refused.check(values)
