"""Write tests/data/goldens/*.npz: what transformers in float32 answers to the parity prompts.

    python tests/parity/make_goldens.py        (needs the extra `parity`; minutes for both models on 2 cores)

The tests compare with these files, and so need no torch.

Each file holds, for P prompts, G generated tokens, and all prompts' tokens joined, L in all:
    meta            JSON text: model, sha256 of the weights, versions, names and rendered texts of the prompts
    prompt_ids      [L] int32      prompt_lengths [P] int32
    prompt_logprobs [L - P] float32, of each prompt's tokens from the second on, prompts joined
    token_ids       [P, G] int32   greedy tokens, end tokens ignored
    logprobs        [P, G] float32, of those tokens
    gaps            [P, G] float32, top logit minus the second
    top_positions   [C] int32, the answer positions of the next three
    top_ids         [P, C, 20] int32       top_logits [P, C, 20] float32
    log_sum_exp     [P, C] float32, a logit minus this is a log-probability
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # comes with the extra parity
import transformers
from prompts import PROMPTS
from reference import Reference, greedy, load_reference, score

from jaxserve.loading.fetch import FETCHABLE_MODELS, fetch_model

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
NUM_TOP = 20
NEAR_TIE = 1e-3  # top-two gap in logits below which the batched generation may choose otherwise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(FETCHABLE_MODELS), action="append", help="default: all")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate for each prompt")
    parser.add_argument("--batch", type=int, default=8, help="prompts generated together")
    arguments = parser.parse_args(argv)
    for name in arguments.model or FETCHABLE_MODELS:
        arrays = make_golden(load_reference(fetch_model(name)), arguments.tokens, arguments.batch)
        arrays["meta"] = np.array(_meta(name, arrays.pop("texts").tolist()))
        GOLDENS.mkdir(parents=True, exist_ok=True)
        target = GOLDENS / f"{name}.npz"
        with target.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        ties = int((arrays["gaps"] < NEAR_TIE).sum())
        size = target.stat().st_size / 1024
        print(f"{target}: {size:.0f} KiB, {ties} near ties in {arrays['gaps'].size} tokens")
    return 0


def make_golden(reference: Reference, num_tokens: int, batch_size: int) -> dict[str, np.ndarray]:
    """The arrays of one golden file, and the rendered prompts under `texts`."""
    texts = [reference.render(prompt) for prompt in PROMPTS]
    prompts = [reference.encode(text) for text in texts]
    answers = greedy(reference.model, prompts, num_tokens, batch_size)
    positions = np.array([p for p in (0, 1, 16, 32, 63) if p < num_tokens], np.int32)
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("logprobs", "gaps", "top_ids", "top_logits", "log_sum_exp")
    }
    prompt_logprobs: list[np.ndarray] = []
    for prompt, ids, answer in zip(PROMPTS, prompts, answers, strict=True):
        scored = score(reference.model, ids + answer, NUM_TOP)
        start = len(ids) - 1  # row that predicts the first generated token
        prompt_logprobs.append(scored.token_logprobs[:start])
        columns["logprobs"].append(scored.token_logprobs[start:])
        columns["gaps"].append(scored.gaps[start:])
        for name in ("top_ids", "top_logits", "log_sum_exp"):
            columns[name].append(getattr(scored, name)[start + positions])
        strays = np.flatnonzero(
            (scored.best_ids[start:] != np.array(answer)) & (scored.gaps[start:] >= NEAR_TIE)
        )
        if strays.size:
            raise ValueError(
                f"prompt {prompt.name}: generation and scoring disagree at {strays[:5].tolist()}"
            )
    return {
        "texts": np.array(texts),
        "prompt_ids": np.concatenate([np.array(ids, np.int32) for ids in prompts]),
        "prompt_lengths": np.array([len(ids) for ids in prompts], np.int32),
        "prompt_logprobs": np.concatenate(prompt_logprobs).astype(np.float32),
        "token_ids": np.array(answers, np.int32),
        "top_positions": positions,
        "logprobs": np.stack(columns["logprobs"]).astype(np.float32),
        "gaps": np.stack(columns["gaps"]).astype(np.float32),
        "top_ids": np.stack(columns["top_ids"]).astype(np.int32),
        "top_logits": np.stack(columns["top_logits"]).astype(np.float32),
        "log_sum_exp": np.stack(columns["log_sum_exp"]).astype(np.float32),
    }


def _meta(name: str, texts: list[str]) -> str:
    meta = {
        "model": name,
        "sha256": FETCHABLE_MODELS[name].sha256,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "names": [prompt.name for prompt in PROMPTS],
        "texts": texts,
    }
    return json.dumps(meta, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
