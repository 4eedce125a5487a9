"""`python -m jaxserve.bench.jaxserve_worker EngineConfig-as-JSON`: our engine as a throughput worker."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

from jaxserve.bench.worker_loop import claim_stdout, serve_runs
from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError


class JaxserveEngine:
    """LLM.generate, greedy."""

    def __init__(self, config: EngineConfig) -> None:
        from jaxserve.assembly import assemble
        from jaxserve.llm import LLM

        self._llm = LLM.from_parts(assemble(config), seed=config.seed)

    def describe(self) -> dict[str, Any]:
        """What the engine settled on."""
        return {"engine": "jaxserve", **dataclasses.asdict(self._llm.info)}

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        """See worker_loop.Engine."""
        from jaxserve.inputs import TokensPrompt
        from jaxserve.sampling_params import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params, use_tqdm=False
        )
        return [output.outputs[0].token_ids for output in outputs]


def main() -> int:
    """Load, then serve runs."""
    replies = claim_stdout()
    start = time.perf_counter()
    try:
        engine = JaxserveEngine(EngineConfig(**json.loads(sys.argv[1])))
    except JaxserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    serve_runs(engine, time.perf_counter() - start, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
