"""A command on one of the hosts that share a model: what it says, and how it ends."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable

from jaxserve.cli.logs import log_to_stderr


def run_on_host(run: Callable[[], int]) -> int:
    """What `run` returns.  Once JAX has joined this host to others, an error or Ctrl-C ends the process here.

    JAX's own end would wait for all hosts, and then abort.
    """
    import jax

    from jaxserve.engine.hosts.session import end_process

    log_to_stderr()  # for whom it waits, above all
    try:
        return run()
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        end_process(error, quietly=isinstance(error, BrokenPipeError) and _is_unread())


def _is_unread() -> bool:
    """Whether the reader of our output went away, which main.py takes for an ordinary end.

    Asked of the pipe, since connections to other hosts break with the same error.
    """
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are told unasked
    return bool(poll.poll(0))
