"""`python -m jaxserve.bench.transformers_worker PATH DTYPE`: transformers' generate as a throughput worker.

A GGUF file is dequantised by transformers, so that both engines compute with the same weights.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

from jaxserve.bench.worker_loop import claim_stdout, serve_runs


class TransformersEngine:
    """AutoModelForCausalLM.generate, greedy, as its documentation says to call it."""

    def __init__(self, path: Path, dtype: str) -> None:
        # By name: torch is in the extra `parity` only, so type checkers must not look for it.
        torch: Any = importlib.import_module("torch")
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch_dtype = getattr(torch, dtype)
        if path.suffix == ".gguf":
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch_dtype
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)
        self._model = model.to(self._device).eval()
        self._dtype = dtype

    def describe(self) -> dict[str, Any]:
        """Versions and threads."""
        import transformers

        return {
            "engine": "transformers",
            "dtype": self._dtype,
            "device": self._device,
            "num_threads": self._torch.get_num_threads(),
            "versions": {"torch": self._torch.__version__, "transformers": transformers.__version__},
        }

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        """See worker_loop.Engine.  All prompts have one length."""
        torch = self._torch
        ids = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            answer = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                pad_token_id=0,
            )
        return answer[:, ids.shape[1] :].tolist()


def main() -> int:
    """Load, then serve runs."""
    replies = claim_stdout()
    start = time.perf_counter()
    engine = TransformersEngine(Path(sys.argv[1]), sys.argv[2])
    serve_runs(engine, time.perf_counter() - start, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
