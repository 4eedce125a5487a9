"""Compare this engine with transformers, both in float32 and on this machine, over real models.

    python tests/parity/against_transformers.py [--model smollm2] [--prompts 32] [--tokens 64]

Needs the extra `parity` (torch).  For every prompt both generate greedy tokens, end tokens ignored.  The
answers must be identical, except that they may part where the reference's own top two logits are within 1e-3.
Up to there, and over the reference's tokens when this engine only scores them, log-probabilities must agree
within 2e-3.  Exits with 0 if all that holds, else with 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from prompts import PROMPTS

from jaxserve import LLM, SamplingParams
from jaxserve.errors import JaxserveError
from jaxserve.loading.fetch import FETCHABLE_MODELS, fetch_model

if TYPE_CHECKING:
    from jaxserve.outputs import Logprob

NEAR_TIE = 1e-3  # top-two gap in logits of the reference below which answers may part
TOLERANCE = 2e-3  # of log-probabilities


@dataclass(frozen=True)
class ReferenceAnswer:
    """What transformers says to one prompt of L tokens, with G tokens of answer."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: np.ndarray  # [L + G - 1], of the sequence's tokens from the second on
    gaps: np.ndarray  # [G], top logit minus the second


@dataclass(frozen=True)
class OurAnswer:
    """What this engine says to the same prompt, and what it thinks of the reference's answer."""

    token_ids: list[int]
    logprobs: np.ndarray  # [G]
    forced_logprobs: np.ndarray  # [L + G - 1], of the reference's sequence from its second token on


@dataclass(frozen=True)
class Comparison:
    """One prompt's verdict."""

    name: str
    divergence: int | None  # first answer position where the tokens differ
    gap: float  # the reference's top-two gap there; 0 without a divergence
    max_difference: float  # of log-probabilities of the tokens both generated, up to the divergence
    max_forced_difference: float  # of log-probabilities of the reference's prompt and answer

    @property
    def is_permitted(self) -> bool:
        """Whether the prompt passes."""
        return self.gap < NEAR_TIE and max(self.max_difference, self.max_forced_difference) <= TOLERANCE


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 all within bounds, 1 not, 2 the comparison cannot be made."""
    parser = argparse.ArgumentParser(description="Compare this engine with transformers in float32.")
    parser.add_argument("--model", choices=sorted(FETCHABLE_MODELS), action="append", help="default: all")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts to use")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--reference-batch", type=int, default=8, help="prompts transformers runs together")
    arguments = parser.parse_args(argv)
    for name, most in (("prompts", len(PROMPTS)), ("tokens", 1024), ("reference_batch", 256)):
        if not 1 <= getattr(arguments, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be from 1 to {most}")
    if importlib.util.find_spec("torch") is None:
        print("This comparison needs torch: make install EXTRAS=dev,parity", file=sys.stderr)
        return 2
    rows, has_passed = [], True
    for model in arguments.model or FETCHABLE_MODELS:
        try:
            comparisons = compare_model(model, arguments.prompts, arguments.tokens, arguments.reference_batch)
        except JaxserveError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        rows.append(_row(model, comparisons))
        has_passed = has_passed and all(c.is_permitted for c in comparisons)
    print(f"\nfloat32, {arguments.prompts} prompts x {arguments.tokens} greedy tokens")
    _print_table(rows)
    print("PASS" if has_passed else "FAIL")
    return 0 if has_passed else 1


def compare_model(name: str, num_prompts: int, num_tokens: int, reference_batch: int) -> list[Comparison]:
    """Run both sides in turn, so that only one model is in memory, and print where they differ."""
    path = str(fetch_model(name))
    start = time.monotonic()
    references = reference_answers(path, num_prompts, num_tokens, reference_batch)
    gc.collect()
    print(f"{name}: transformers took {time.monotonic() - start:.0f} s", file=sys.stderr)
    start = time.monotonic()
    ours = our_answers(path, references, num_tokens)
    print(f"{name}: jaxserve took {time.monotonic() - start:.0f} s", file=sys.stderr)
    comparisons = [
        compare(prompt.name, reference, answer)
        for prompt, reference, answer in zip(PROMPTS, references, ours, strict=False)
    ]
    for comparison in comparisons:
        if comparison.divergence is not None or not comparison.is_permitted:
            print(_remark(name, comparison))
    return comparisons


def reference_answers(path: str, num_prompts: int, num_tokens: int, batch: int) -> list[ReferenceAnswer]:
    """Greedy answers of transformers, scored without padding or cache."""
    from pathlib import Path

    from reference import greedy, load_reference, score  # torch, which main has looked for

    reference = load_reference(Path(path))
    prompts = [reference.encode(reference.render(prompt)) for prompt in PROMPTS[:num_prompts]]
    answers = []
    for ids, token_ids in zip(prompts, greedy(reference.model, prompts, num_tokens, batch), strict=True):
        scored = score(reference.model, ids + token_ids, num_top=2)
        answers.append(ReferenceAnswer(ids, token_ids, scored.token_logprobs, scored.gaps[len(ids) - 1 :]))
    return answers


def our_answers(path: str, references: Sequence[ReferenceAnswer], num_tokens: int) -> list[OurAnswer]:
    """Greedy answers of this engine to all prompts at once, then its scores of the reference's answers."""
    longest = max(len(reference.prompt_ids) for reference in references) + num_tokens
    max_model_len = -(-(longest + 1) // 512) * 512  # few different lengths: each is compiled for
    generating = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(path, dtype="float32", max_model_len=max_model_len) as llm:
        generated = llm.generate([reference.prompt_ids for reference in references], generating)
        sequences = [reference.prompt_ids + reference.token_ids for reference in references]
        scored = llm.generate(sequences, scoring)
    answers = []
    for request, forced, sequence in zip(generated, scored, sequences, strict=True):
        completion = request.outputs[0]
        assert completion.logprobs is not None
        assert forced.prompt_logprobs is not None
        answers.append(
            OurAnswer(
                token_ids=completion.token_ids,
                logprobs=_of_tokens(completion.logprobs, completion.token_ids),
                forced_logprobs=_of_tokens(forced.prompt_logprobs[1:], sequence[1:]),
            )
        )
    return answers


def compare(name: str, reference: ReferenceAnswer, ours: OurAnswer) -> Comparison:
    """Measure one answer of ours against the reference's."""
    pairs = zip(ours.token_ids, reference.token_ids, strict=True)
    divergence = next((i for i, (own, other) in enumerate(pairs) if own != other), None)
    start = len(reference.prompt_ids) - 1
    agreed = len(reference.token_ids) if divergence is None else divergence
    differences = np.abs(ours.logprobs - reference.logprobs[start:])[:agreed]
    return Comparison(
        name=name,
        divergence=divergence,
        gap=0.0 if divergence is None else float(reference.gaps[divergence]),
        max_difference=float(differences.max(initial=0.0)),
        max_forced_difference=float(np.abs(ours.forced_logprobs - reference.logprobs).max(initial=0.0)),
    )


def _of_tokens(positions: Sequence[dict[int, Logprob] | None], token_ids: Sequence[int]) -> np.ndarray:
    """Each token's own log-probability."""
    found = []
    for position, token_id in zip(positions, token_ids, strict=True):
        assert position is not None
        found.append(position[token_id].logprob)
    return np.array(found)


def _remark(model: str, comparison: Comparison) -> str:
    where = "same tokens"
    if comparison.divergence is not None:
        where = f"parts at token {comparison.divergence}, reference's top-two gap {comparison.gap:.2g}"
    verdict = "permitted" if comparison.is_permitted else "NOT permitted"
    worst = max(comparison.max_difference, comparison.max_forced_difference)
    return f"{model}/{comparison.name}: {where}, max |Δ log-prob| {worst:.2g}: {verdict}"


def _row(model: str, comparisons: Sequence[Comparison]) -> list[str]:
    parted = [c for c in comparisons if c.divergence is not None]
    return [
        model,
        f"{len(comparisons) - len(parted)}/{len(comparisons)}",
        str(len(parted)),
        f"{max((c.gap for c in parted), default=0.0):.2g}",
        f"{max(c.max_difference for c in comparisons):.2g}",
        f"{max(c.max_forced_difference for c in comparisons):.2g}",
        "PASS" if all(c.is_permitted for c in comparisons) else "FAIL",
    ]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    header = ("model", "identical", "parted", "widest gap", "max|Δlogprob|", "over reference's tokens", "")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
