"""A two-layer model with random weights in a real engine, and what it must answer, computed densely."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.client import InProcessClient, build_client
from jaxserve.engine.protocol import CoreRequest, TokenOutput
from jaxserve.kernels_pallas.metadata import AttentionMetadata
from jaxserve.models.parameters import dummy_model
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.compiler import GrammarCompiler
from tests.patience import PATIENCE
from tests.quick_compile import QUICK

TINY = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=100,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=True,
    layer_windows=(None, None),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    hidden_act="silu",
    experts=None,
    vision=None,
)


def tiny_config(cache_dir: str, **options: object) -> EngineConfig:
    """A float32 engine, on a GPU too, of 4 sequences, 32 tokens a step and pages of 8 tokens."""
    settings: dict[str, object] = {
        "dtype": "float32",
        "page_size": 8,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "compile_cache_dir": cache_dir,
        "seed": 3,
    }
    return EngineConfig(model="tiny", load_format="dummy", **(settings | options))  # type: ignore[arg-type]  # by name


def build_tiny(cache_dir: str, **options: object) -> InProcessClient:
    """The unstarted client."""
    return build_client(tiny_config(cache_dir, **options), None, TINY)


def build_constrained(cache_dir: str, grammars: GrammarCompiler, **options: object) -> InProcessClient:
    """The same, for requests that follow grammars."""
    return build_client(tiny_config(cache_dir, **options), None, TINY, grammars)


def request(
    request_id: str,
    prompt: Sequence[int],
    *,
    eos: tuple[int, ...] = (),
    stop: tuple[int, ...] = (),
    **params: object,
) -> CoreRequest:
    """A request; greedy unless told otherwise."""
    settings = {"temperature": 0.0, "max_tokens": 8, "seed": 0} | params
    return CoreRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(**settings),  # type: ignore[arg-type]  # by name
        eos_token_ids=eos,
        stop_token_ids=stop,
    )


def wait_until_idle(client: InProcessClient) -> None:
    """Until the device has nothing to do: when an answer's end is told, the step behind it is still to be fetched."""
    has_work = True
    while has_work:
        asked: Future[bool] = Future()
        client._orders.put(lambda asked=asked: asked.set_result(client._core.has_work))
        has_work = asked.result(PATIENCE)


@dataclass
class Collector:
    """Callbacks of a client, and a wait for the end of requests."""

    outputs: dict[str, list[TokenOutput]] = field(default_factory=dict)
    error: Exception | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def on_outputs(self, batch: Sequence[TokenOutput]) -> None:
        with self._changed:
            for output in batch:
                self.outputs.setdefault(output.request_id, []).append(output)
            self._changed.notify_all()

    def on_dead(self, error: Exception) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def wait(self, *request_ids: str) -> None:
        """Until all of them ended or the engine died."""

        def done() -> bool:
            ended = all(self.outputs.get(i) and self.outputs[i][-1].finish_reason for i in request_ids)
            return ended or self.error is not None

        with self._changed:
            assert self._changed.wait_for(done, PATIENCE)

    def wait_for_output(self, request_id: str) -> None:
        """Until the request gave its first token."""
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.outputs.get(request_id)), PATIENCE)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]


class DenseModel:
    """The same weights, drawn in `dtype` and computed with in float32, one whole forward pass per question."""

    def __init__(self, seed: int, config: ModelConfig = TINY, dtype: str = "float32") -> None:
        self._length = config.max_position_embeddings
        graphdef, state = dummy_model(config, jnp.dtype(dtype), seed)
        state = jax.tree.map(lambda x: x.astype(jnp.float32), state)

        @partial(jax.jit, compiler_options=QUICK if jax.default_backend() == "cpu" else None)
        def logits(token_ids: jax.Array) -> jax.Array:
            size = token_ids.shape[0]
            meta = AttentionMetadata(
                positions=jnp.arange(size),
                token_rows=jnp.zeros(size, jnp.int32),
                page_table=jnp.arange(1, 1 + size // 8)[None],
                kv_lens=jnp.asarray([size]),
                query_starts=jnp.asarray([0, size]),
                tile_rows=jnp.zeros(1, jnp.int32),
                tile_starts=jnp.zeros(1, jnp.int32),
                num_tiles=jnp.int32(1),
                kind="mixed",
                tile_size=size,
            )
            model = nnx.merge(graphdef, state)
            page = (1 + size // 8, 8, config.num_kv_heads, 2, config.head_dim)
            pages = tuple(jnp.zeros(page) for _ in range(config.num_layers))
            hidden, _ = model(token_ids, pages, meta)
            return model.logits(hidden)

        self._logits = logits

    def log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        """Log-probabilities [T, V] after each token; causal, so padding behind does not matter."""
        padded = np.zeros(self._length, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.asarray(self._logits(padded), np.float64)[: len(tokens)]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.log_probs(tokens)[-1].argmax()))
        return tokens[len(prompt) :]
