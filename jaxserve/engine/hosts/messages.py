"""What the hosts of an engine tell each other, and how it is written."""

from __future__ import annotations

import msgspec
import numpy as np

from jaxserve.engine.plan import Admission, StepPlan


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A follower's first words."""

    rank: int
    num_hosts: int  # of which it takes itself for one


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The first host's answer, once all are there: JAX's runtimes may join."""


class Settled(msgspec.Struct, frozen=True, tag=True):
    """What a follower is about to build."""

    facts: dict[str, str]  # by name, what all hosts must have in common
    num_pages: int  # that fit there


class Agreed(msgspec.Struct, frozen=True, tag=True):
    """The first host's answer, once all have settled."""

    num_pages: int  # that fit everywhere


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Runner.admit."""

    admission: Admission


class Dispatch(msgspec.Struct, frozen=True, tag=True):
    """Runner.dispatch."""

    plan: StepPlan


class Start(msgspec.Struct, frozen=True, tag=True):
    """Runner.start."""

    plan: StepPlan


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Runner.finish of the step that was started last."""

    plan: StepPlan
    masks: dict[int, bytes]  # of entries, [words] uint32

    @classmethod
    def of(cls, plan: StepPlan, allowed: dict[int, np.ndarray]) -> Finish:
        return cls(plan, {row: mask.tobytes() for row, mask in allowed.items()})

    @property
    def allowed(self) -> dict[int, np.ndarray]:
        return {row: np.frombuffer(mask, np.uint32) for row, mask in self.masks.items()}


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Nothing but that the sender is there."""


class End(msgspec.Struct, frozen=True, tag=True):
    """The sender goes; with a reason where that is an error."""

    error: str = ""


Message = Hello | Welcome | Settled | Agreed | Admit | Dispatch | Start | Finish | Alive | End

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """What `encode` was given.  Raises msgspec.ValidationError or DecodeError for anything else."""
    return _decoder.decode(data)
