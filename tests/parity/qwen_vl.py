"""Compare Qwen2-VL and Qwen2.5-VL here with transformers', in float32, over small random models of the real kind.

    python -m tests.parity.qwen_vl [--write]

Needs torch and transformers (the extra `parity`).  Both answer conversations with images greedily, and say what they
think of every token: tokens must be equal, and logits within 2e-3.  Then a second turn follows upon the first answer,
with another image.  `--write` writes down what transformers says, for the tests that run without torch.  Exits with 0
if all that holds, else with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # comes with the extra parity
import transformers
from flax import nnx

from jaxserve.models.loading import load_model
from tests.models.vision_cases import (
    CONFIGS,
    GOLDENS,
    NUM_GENERATED,
    NUM_LOGITS,
    TURNS,
    Turn,
    checkpoint,
    conversation,
    pixel_values,
)
from tests.models.vision_run import SeeingModel

TOLERANCE = 2e-3  # of logits


class Reference:
    """transformers' model with the weights of ours."""

    def __init__(self, name: str) -> None:
        family = "Qwen2VL" if name == "qwen2_vl" else "Qwen2_5_VL"
        config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(CONFIGS[name])))
        config._attn_implementation = "eager"
        self._model = getattr(transformers, f"{family}ForConditionalGeneration")(config).float().eval()
        weights = {newer_name(key): torch.tensor(value) for key, value in checkpoint(name).weights.items()}
        missing, left_over = self._model.load_state_dict(weights, strict=False)
        assert not left_over, left_over
        assert set(missing) <= {"lm_head.weight"}, missing
        self._model.tie_weights()

    @torch.inference_mode()
    def logits(self, turn: Turn) -> np.ndarray:
        """Logits [T, V], in one pass without a cache."""
        ids = torch.tensor([turn.token_ids])
        inputs: dict[str, Any] = {}
        if turn.images:
            kinds = torch.zeros_like(ids)
            for image in turn.images:
                kinds[0, image.offset : image.offset + image.num_tokens] = 1
            inputs = {
                "pixel_values": torch.tensor(np.concatenate([pixel_values(image) for image in turn.images])),
                "image_grid_thw": torch.tensor([image.grid_thw for image in turn.images]),
                "mm_token_type_ids": kinds,
            }
        self._model.model.rope_deltas = None
        return self._model(input_ids=ids, use_cache=False, **inputs).logits[0].numpy()


def newer_name(name: str) -> str:
    """What transformers calls a tensor today."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def answer(model: Any, turn: Turn) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits of all positions but the last [T + N - 1, V]."""
    token_ids = list(turn.token_ids)
    for _ in range(NUM_GENERATED):
        token_ids.append(int(model.logits(Turn(token_ids, turn.images))[-1].argmax()))
    logits = model.logits(Turn(token_ids[:-1], turn.images))
    return token_ids[len(turn.token_ids) :], logits


def second_turn(turn: Turn, said: Sequence[int]) -> Turn:
    """The conversation goes on with another image."""
    more = conversation((6, 8), seed=9)
    start = len(turn.token_ids) + len(said)
    (image,) = more.images
    moved = type(image)(
        pixels=image.pixels,
        grid_thw=image.grid_thw,
        content_hash=image.content_hash,
        offset=image.offset + start,
        num_tokens=image.num_tokens,
    )
    return Turn([*turn.token_ids, *said, *more.token_ids], (*turn.images, moved))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare models that see with transformers, in float32.")
    parser.add_argument("--write", action="store_true", help="write the goldens of the tests")
    arguments = parser.parse_args()
    passed, written = True, {}
    for name in CONFIGS:
        ours = SeeingModel(nnx.merge(*load_model(checkpoint(name), jnp.dtype("float32"), progress=False)))
        reference = Reference(name)
        for title, turn in TURNS.items():
            said, logits = answer(reference, turn)
            for label, asked in ((title, turn), (f"{title}, and on", second_turn(turn, said))):
                wanted, wanted_logits = answer(reference, asked)
                got, got_logits = answer(ours, asked)
                difference = float(np.abs(got_logits - wanted_logits).max())
                top = np.sort(wanted_logits[len(asked.token_ids) - 1 :], axis=-1)
                gap = float((top[:, -1] - top[:, -2]).min())
                holds = got == wanted and difference <= TOLERANCE
                passed = passed and holds
                print(
                    f"{name}, {label}: {len(asked.token_ids)} tokens, {len(asked.images)} images: max |Δ logit| "
                    f"{difference:.1e}, {'same' if got == wanted else 'OTHER'} tokens, narrowest gap {gap:.2g}: "
                    f"{'ok' if holds else 'FAILED'}"
                )
            written.setdefault(name, {})[title] = {
                "token_ids": said,
                "logits": logits[len(turn.token_ids) - 1, :NUM_LOGITS].astype(float).round(5).tolist(),
            }
    if arguments.write:
        GOLDENS.write_text(json.dumps(written, indent=1) + "\n")
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
