"""The closed set of shapes that the engine compiles before it serves."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.sampling_rows import VARIANTS, Variant
from jaxserve.kernels_pallas.metadata import StepKind

_PROMPT_LOGPROBS_CHUNK = 64  # prompt positions whose logits exist at a time


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """One compiled forward pass: `num_tokens` input tokens, padding included."""

    kind: StepKind
    num_tokens: int
    num_rows: int  # rows of the page table; in a mixed step the last one is the padding row
    tile_size: int  # queries a tile of a mixed step
    max_pages: int  # pages a row can have

    @property
    def num_tiles(self) -> int:
        """Tiles that any mix of `num_rows` sequences can need."""
        return 0 if self.kind == "decode" else self.num_tokens // self.tile_size + self.num_rows

    @property
    def name(self) -> str:
        return f"forward_{self.kind}_{self.num_tokens}"


@dataclass(frozen=True, slots=True)
class SampleShape:
    """One compiled sampler: logits of `num_rows` hidden rows and a token from each."""

    num_rows: int
    variant: Variant
    with_logprobs: bool

    @property
    def name(self) -> str:
        return f"sample_{self.variant}{'_logprobs' if self.with_logprobs else ''}_{self.num_rows}"


@dataclass(frozen=True, slots=True)
class Lattice:
    """Every shape a step can have.  Forward and sampling are compiled apart, so their numbers add, not multiply."""

    forwards: tuple[ForwardShape, ...]
    samples: tuple[SampleShape, ...]
    max_num_seqs: int
    max_num_batched_tokens: int

    def forward(self, kind: StepKind, num_tokens: int) -> ForwardShape:
        """The smallest forward pass that holds `num_tokens`."""
        return min(
            (f for f in self.forwards if f.kind == kind and f.num_tokens >= num_tokens), key=lambda f: f.num_tokens
        )

    def sample(self, num_rows: int, variant: Variant, with_logprobs: bool) -> SampleShape:
        """The smallest and least sampler that holds `num_rows` and does what `variant` does."""
        wanted = VARIANTS.index(variant)
        return min(
            (
                s
                for s in self.samples
                if s.with_logprobs == with_logprobs
                and s.num_rows >= num_rows
                and VARIANTS.index(s.variant) >= wanted
            ),
            key=lambda s: (VARIANTS.index(s.variant), s.num_rows),
        )

    def prompt_chunk(self, forward: ForwardShape) -> int:
        """Prompt positions that one call of the prompt log-probability program takes."""
        return min(_PROMPT_LOGPROBS_CHUNK, forward.num_tokens)

    def resizes(self) -> list[tuple[int, int]]:
        """(rows a forward pass gives, rows a sampler takes) wherever they differ."""
        given = {f.num_tokens if f.kind == "decode" else self.max_num_seqs for f in self.forwards}
        taken = {s.num_rows for s in self.samples}
        return sorted((g, t) for g in given for t in taken if g != t)


def build_lattice(
    *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, page_size: int, platform: str
) -> Lattice:
    """Buckets for one engine.  Fewer on CPU, where two cores do the compiling and padding rows cost little."""
    on_cpu = platform == "cpu"
    rows = _buckets(1, max_num_seqs, 4 if on_cpu else 2)
    if on_cpu:  # 4 -> 16 would double the price of eight chats
        rows = sorted({*rows, *(n for n in (8, 32) if n <= max_num_seqs)})
    tokens = _buckets(16 if on_cpu else 64, max_num_batched_tokens, 4)
    max_pages = -(-max_model_len // page_size)
    forwards = [ForwardShape("decode", n, n, 1, max_pages) for n in rows]
    forwards += [ForwardShape("mixed", n, max_num_seqs + 1, min(32, n), max_pages) for n in tokens]
    # Penalties, masks and log-probabilities are rarer: coarser buckets.
    coarse = sorted({rows[0], *(n for n in rows if n in (8, 64)), rows[-1]})
    # On CPU "random" skips at run time what no row wants; elsewhere a condition would break the CUDA graph.
    common: tuple[Variant, ...] = ("greedy", "random") if on_cpu else ("greedy", "temperature", "random")
    samples = [SampleShape(n, variant, False) for variant in common for n in rows]
    samples += [SampleShape(n, "full", with_logprobs) for with_logprobs in (False, True) for n in coarse]
    samples += [SampleShape(n, variant, True) for variant in ("greedy", "random") for n in coarse]
    return Lattice(tuple(forwards), tuple(samples), max_num_seqs, max_num_batched_tokens)


def _buckets(first: int, last: int, factor: int) -> list[int]:
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return [*sizes, last]
