"""The engine under measurement: LLM as users call it, with random prompts that no prefix cache knows."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.h100.models import write_model
from jaxserve.config import EngineConfig, ModelConfig
from jaxserve.engine.protocol import CoreRequest
from jaxserve.inputs import TokensPrompt
from jaxserve.sampling_params import SamplingParams

GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 1}
# As the peer ran, where it matters to the work: no prefix cache, room for 8192 tokens a sequence.
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 8192,
    "max_num_seqs": 256,
    "enable_prefix_caching": False,
    "seed": 0,
}


class Engine:
    """One model in this process.  A context manager: leaving it frees the device."""

    def __init__(self, model: str, folder: Path, overrides: dict[str, Any]) -> None:
        """Load random weights and compile; `overrides` are EngineConfig's fields over SETTINGS."""
        from jaxserve.assembly import assemble
        from jaxserve.llm import LLM
        from jaxserve.loading.resolve import open_config

        start = time.perf_counter()
        path = write_model(model, folder)
        config = EngineConfig(model=str(path), **(SETTINGS | overrides))
        parts = assemble(config)
        self.model = model
        self.model_config: ModelConfig = open_config(str(path))[0]
        self._client = parts.client
        self._llm = LLM.from_parts(parts, seed=config.seed)
        self.load_seconds = time.perf_counter() - start
        self.info = self._llm.info
        self._rng = random.Random(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llm.shutdown()

    def run(self, batch: int, prompt: int, output: int, sampling: dict[str, Any] = GREEDY) -> float:
        """Seconds from `batch` new prompts of `prompt` random tokens to the last of `output` tokens each."""
        prompts = [TokensPrompt(prompt_token_ids=self._random_prompt(prompt)) for _ in range(batch)]
        params = SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False, **sampling)
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        lengths = {len(answer.outputs[0].token_ids) for answer in outputs}
        assert lengths == {output}, f"answers of {lengths} tokens where {output} were asked for"
        return seconds

    @contextmanager
    def decoding(self, batch: int, prompt: int, sampling: dict[str, Any] = GREEDY) -> Iterator[None]:
        """Keep `batch` new requests going until the block ends, and then until the engine is idle."""
        room = self.info.max_model_len - prompt
        settings: dict[str, Any] = {"seed": 0, "max_tokens": room, "ignore_eos": True, **sampling}
        params = SamplingParams(**settings)
        requests = [
            CoreRequest(
                request_id=f"background-{i}",
                prompt_token_ids=self._random_prompt(prompt),
                params=params,
                eos_token_ids=(),
            )
            for i in range(batch)
        ]
        self._client.submit(requests)
        try:
            yield
        finally:
            self._client.abort([request.request_id for request in requests])
            while self._client.stats().num_running:
                time.sleep(0.001)
            time.sleep(0.1)  # the steps that were in flight when the last request went

    def _random_prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(self.info.vocab_size) for _ in range(length)]

    @property
    def num_steps(self) -> int:
        """Steps planned so far; may be read while `run` is under way on another thread."""
        return self._client.stats().num_steps

    @property
    def compiles_after_ready(self) -> int:
        """Programs compiled since start: anything but 0 is a fault."""
        return self._client.stats().compiles_after_ready
