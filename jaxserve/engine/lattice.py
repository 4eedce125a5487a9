"""The closed set of shapes that the engine compiles before it serves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxserve.engine.sampling_rows import VARIANTS, Variant, covers
from jaxserve.kernels_pallas.metadata import StepKind

MIN_PAGE_SIZE = 8  # tokens; the least that EngineConfig takes
_SMALL_HIDDEN_SIZE = 2048  # up to here an accelerator runs a single sequence in a step of 8
_BURST_ROWS = (
    64  # up to here small models have bursts as one program: beyond, a step outlasts the host's work
)
_PROMPT_LOGPROBS_CHUNK = 64  # prompt positions whose logits exist at a time


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """One compiled forward pass: `num_tokens` input tokens, padding included."""

    kind: StepKind
    num_tokens: int
    num_rows: int  # rows of the page table; in a mixed step the last one is the padding row
    tile_size: int  # queries a tile of a mixed step
    max_pages: int  # pages a row can have
    scores_prompts: bool = False  # a mixed step that also gives the hidden states of all its tokens
    has_images: bool = False  # of models that see: tokens may be images', and stand where M-RoPE says

    @property
    def num_tiles(self) -> int:
        """Tiles that any mix of `num_rows` sequences can need."""
        return 0 if self.kind == "decode" else self.num_tokens // self.tile_size + self.num_rows

    @property
    def num_new_pages(self) -> int:
        """New pages that fit into a step's vector; more, as of a long cached prefix, go ahead of it."""
        return self.num_rows + (0 if self.kind == "decode" else self.num_tokens // MIN_PAGE_SIZE)

    @property
    def name(self) -> str:
        return f"forward_{'scoring' if self.scores_prompts else self.kind}_{self.num_tokens}"


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
class BurstShape:
    """A whole burst of MAX_BURST decode steps, each a forward pass and a sampler, as one compiled program."""

    forward: ForwardShape
    sample: SampleShape

    @property
    def name(self) -> str:
        return f"burst_{self.forward.num_tokens}_{self.sample.name}"


@dataclass(frozen=True, slots=True)
class Lattice:
    """Every shape a step can have.  Forward and sampling are compiled apart, so their numbers add, not multiply."""

    forwards: tuple[ForwardShape, ...]
    samples: tuple[SampleShape, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    bursts: tuple[BurstShape, ...] = ()
    # Up to so many tokens, a step with short chunks among them is a decode step, each token in a row of its own:
    # padding rows cost as much as others.  0 where a program may look at keys before all rows have written theirs.
    chunk_rows: int = 0

    def forward(self, kind: StepKind, num_tokens: int) -> ForwardShape:
        """The smallest forward pass that holds `num_tokens`."""
        return min(
            (
                f
                for f in self.forwards
                if f.kind == kind and not f.scores_prompts and f.num_tokens >= num_tokens
            ),
            key=lambda f: f.num_tokens,
        )

    def step(self, num_tokens: int, num_entries: int, num_steps: int = 1) -> ForwardShape:
        """The forward pass of a step, or of each step of a burst, in which so many sequences run so many tokens."""
        if num_tokens > max(self.chunk_rows, num_entries):
            return self.forward("mixed", num_tokens)
        decode = self.forward("decode", num_tokens)
        if not self.chunk_rows or num_steps > 1:
            return decode
        # On CPUs padding takes its time: 12 sequences of SmolLM2 took 15 % less processor time with the 16 tokens of a
        # mixed step than with 32 rows (2 cores, jax 0.10.2, 2026-11-25).
        mixed = self.forward("mixed", num_tokens)
        return mixed if mixed.num_tokens < decode.num_tokens else decode

    def burst(self, forward: ForwardShape, sample: SampleShape) -> BurstShape | None:
        """The program that runs whole bursts of these, if there is one."""
        wanted = BurstShape(forward, sample)
        return wanted if wanted in self.bursts else None

    @property
    def scoring(self) -> ForwardShape:
        """The forward pass of steps in which somebody wants prompt log-probabilities: its tokens are their budget.

        There is one, of a middling size: hidden states of all tokens are kept, and the last layer runs whole, for
        those alone who ask.
        """
        return next(f for f in self.forwards if f.scores_prompts)

    def sample(self, num_rows: int, variant: Variant, with_logprobs: bool) -> SampleShape:
        """The cheapest sampler, and of that the smallest, that does what is asked for."""
        return min(
            (
                s
                for s in self.samples
                if s.with_logprobs >= with_logprobs and s.num_rows >= num_rows and covers(s.variant, variant)
            ),
            key=lambda s: (VARIANTS.index(s.variant), s.with_logprobs, s.num_rows),
        )

    @property
    def max_pages(self) -> int:
        """Pages that a sequence can have."""
        return self.forwards[0].max_pages

    @property
    def prompt_chunk(self) -> int:
        """Prompt positions that one call of the prompt log-probability program takes."""
        return min(_PROMPT_LOGPROBS_CHUNK, self.scoring.num_tokens)

    def resizes(self) -> list[tuple[int, int]]:
        """(rows a forward pass gives, rows a sampler takes) wherever some step's two differ."""
        kinds: set[tuple[Variant, bool]] = {(s.variant, s.with_logprobs) for s in self.samples}
        decodes = sorted(f.num_tokens for f in self.forwards if f.kind == "decode")
        found = set()
        for variant, with_logprobs in kinds:
            takes = {count: self.sample(count, variant, with_logprobs).num_rows for count in self._counts()}
            for below, given in zip((0, *decodes), decodes, strict=False):
                fewest = 0 if given <= self.chunk_rows else below
                found |= {(given, takes[count]) for count in self._counts() if fewest < count <= given}
            found |= {(self.max_num_seqs, taken) for taken in takes.values()}
        return sorted((given, taken) for given, taken in found if given != taken)

    def _counts(self) -> list[int]:
        """Numbers of sequences in a step, one for each way in which buckets can fall."""
        edges = {f.num_tokens for f in self.forwards if f.kind == "decode"} | {
            s.num_rows for s in self.samples
        }
        return sorted({*edges, *(edge + 1 for edge in edges if edge < self.max_num_seqs), 1})


def build_lattice(
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    page_size: int,
    platform: str,
    hidden_size: int,
    tile_size: int = 32,
    has_bursts: bool = False,
    has_images: bool = False,
) -> Lattice:
    """Buckets for one engine; `tile_size` is what the platform's attention would have as query tiles.

    `has_bursts`: a step is so short that the host's two calls for it may last longer.

    Few on CPU: compiling takes half a minute of processor time a dozen programs, while a padding row costs little
    beside reading the weights.  An accelerator reads the weights for up to some 300 tokens in the time in which it
    multiplies them, so below that there are few buckets too; above, padding costs in proportion.
    """
    max_pages = -(-max_model_len // page_size)
    if platform == "cpu":
        rows = _buckets((1, 8), max_num_seqs, 4)
        tokens = _buckets((16,), max_num_batched_tokens, 4)
        # One program does all that is not greedy: it skips at run time what no row wants.
        samples = [SampleShape(n, "greedy", False) for n in rows]
        samples += [SampleShape(n, "full", True) for n in rows]
    else:
        # Between 1 and 8 there is nothing to gain: one row of 8 takes 5.37 ms of forward pass with Llama 8B, one of 1
        # 5.23, and with Llama 1B it is 1.05 and 1.28, as XLA has poor kernels for products of a single small row (H100,
        # jax 0.11.2, 2026-11-25).
        rows = _buckets((1, 8) if hidden_size > _SMALL_HIDDEN_SIZE else (8,), max_num_seqs, 2)
        tokens = _halves((64, 256), max_num_batched_tokens)
        # Straight-line programs, as a condition would break the CUDA graph; coarser buckets for what is rarer.  Up to
        # 64 rows the head's weights are most of a sampler's time, and padding rows cost little.
        coarse = sorted({*(n for n in rows if n in (8, 64)), rows[-1]})
        rare = sorted({*(n for n in rows if n == 8), rows[-1]})
        # A GPU's kernel looks no further than a row's filters need, so that the variants for top_k would gain nothing.
        has_kernel = platform == "gpu"
        common: tuple[Variant, ...] = ("random",) if has_kernel else ("temperature", "top_k", "random")
        samples = [SampleShape(n, "greedy", False) for n in rows]
        samples += [SampleShape(n, variant, False) for variant in common for n in coarse]
        processing: tuple[Variant, ...] = ("full",) if has_kernel else ("full_top_k", "full")
        samples += [SampleShape(n, variant, False) for variant in processing for n in coarse]
        with_logprobs: tuple[Variant, ...] = ("greedy", "full")
        samples += [SampleShape(n, variant, True) for variant in with_logprobs for n in rare]
    chunk_rows = max((n for n in rows if n < tokens[0]), default=0) if platform == "cpu" else 0
    forwards = [ForwardShape("decode", n, n, 1, max_pages) for n in rows]
    forwards += [ForwardShape("mixed", n, max_num_seqs + 1, min(tile_size, n), max_pages) for n in tokens]
    # Room for every other sequence's token and as many of a prompt; a GPU is busy from some hundred tokens on.
    room = max(2 * max_num_seqs, 16 if platform == "cpu" else 512)
    scoring = next((n for n in tokens if n >= room), tokens[-1])
    tile = min(tile_size, scoring)
    forwards.append(ForwardShape("mixed", scoring, max_num_seqs + 1, tile, max_pages, scores_prompts=True))
    forwards = [replace(forward, has_images=has_images) for forward in forwards]
    lattice = Lattice(
        tuple(forwards), tuple(samples), max_num_seqs, max_num_batched_tokens, chunk_rows=chunk_rows
    )
    if not has_bursts:
        return lattice
    short = [
        forward for forward in forwards if forward.kind == "decode" and forward.num_tokens <= _BURST_ROWS
    ]
    variants: tuple[Variant, ...] = ("greedy", "random")
    bursts = [
        BurstShape(f, lattice.sample(f.num_tokens, variant, False)) for f in short for variant in variants
    ]
    return replace(lattice, bursts=tuple(bursts))


def _halves(first: tuple[int, ...], last: int) -> list[int]:
    """`first`, then `last` and its halves, to a multiple of 16, as far as they are well above."""
    sizes = [size for size in first if size < last]
    halves = [last]
    while (half := -(-halves[-1] // 32) * 16) > 1.5 * first[-1]:
        halves.append(half)
    return [*sizes, *reversed(halves)]


def _buckets(first: tuple[int, ...], last: int, factor: int) -> list[int]:
    """`first`, then growing by `factor`, up to and including `last`."""
    sizes = [size for size in first if size < last]
    size = first[-1] * factor
    while size < last:
        sizes.append(size)
        size *= factor
    return [*sizes, last]
