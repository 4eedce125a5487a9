"""Progress: bars on a terminal and lines in a log, and the bar of LLM.generate, with tokens per second."""

from __future__ import annotations

import io
import sys
import time

import tqdm as plain_tqdm
from tqdm.auto import tqdm

REFRESH_SECONDS = 0.25  # often enough to look alive, seldom enough to cost nothing
_UP = "\x1b[A"  # how a bar below another one returns
LINE_SECONDS = 10.0  # between lines where there is no bar


def progress_bar(
    total: int, description: str, unit: str, *, initial: int = 0, enabled: bool = True
) -> plain_tqdm.tqdm[None]:
    """A bar on stderr.  In a file every refresh would stay: there it is a line now and then, of work that takes long.

    Numbers of bytes (unit "B") are told in GB and MB.
    """
    is_seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    options = {
        "total": total,
        "initial": initial,
        "desc": description,
        "unit": unit,
        "unit_scale": unit == "B",
        "disable": not enabled,
    }
    if is_seen:
        return plain_tqdm.tqdm(file=sys.stderr, **options)
    suffix = "B" if unit == "B" else ""
    form = f"{{desc}}: {{n_fmt}}{suffix} of {{total_fmt}}{suffix} after {{elapsed}}"
    seconds = LINE_SECONDS
    return plain_tqdm.tqdm(
        file=_Lines(), bar_format=form, delay=seconds, mininterval=seconds, maxinterval=seconds, **options
    )


class _Lines(io.StringIO):
    """Takes what a bar draws, and writes it to stderr as lines."""

    def write(self, text: str) -> int:
        if line := text.replace(_UP, "").strip():
            sys.stderr.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


class TokenBar:
    """Counts finished requests, and prompt and answer tokens per second since it began."""

    def __init__(self, num_requests: int, *, enabled: bool) -> None:
        self._bar = tqdm(total=num_requests, desc="Generating", unit="req", disable=not enabled)
        self._started_at = time.perf_counter()
        self._refreshed_at = 0.0
        self._seen: set[str] = set()  # requests whose prompt is counted
        self._num_prompt_tokens = 0
        self._num_answer_tokens = 0

    def __enter__(self) -> TokenBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def see_prompt(self, request_id: str, num_tokens: int) -> None:
        """A request has given something, so its prompt is done; counts once."""
        if request_id not in self._seen:
            self._seen.add(request_id)
            self._num_prompt_tokens += num_tokens

    def update(self, num_finished: int, num_answer_tokens: int) -> None:
        """Add requests that have finished, and answer tokens of any request."""
        self._num_answer_tokens += num_answer_tokens
        self._bar.n += num_finished
        now = time.perf_counter()
        is_due = now - self._refreshed_at > REFRESH_SECONDS
        if not num_finished and not is_due:
            return
        elapsed = max(now - self._started_at, 1e-9)
        prompt_speed, answer_speed = self._num_prompt_tokens / elapsed, self._num_answer_tokens / elapsed
        speeds = f"prompt {prompt_speed:.0f} tok/s, answer {answer_speed:.0f} tok/s"
        self._bar.set_postfix_str(speeds, refresh=False)
        if is_due:
            # tqdm would keep the lock of all bars if Ctrl-C came here, and other threads that show one wait for ever.
            with self._bar.get_lock():
                self._bar.refresh(nolock=True)
            self._refreshed_at = now
