"""Compare Qwen2-VL and Qwen2.5-VL here with transformers', in float32, over small random models of the real kind.

    python tests/parity/qwen_vl.py [--write]

Needs torch and transformers (the extra `parity`).  Both answer conversations with images greedily, and say what they
think of every token: tokens must be equal, and logits within 2e-3.  Then a second turn follows upon the first answer,
with another image.  Then photographs go through `jaxserve serve` and transformers' own image processor, where tokens
must be equal and log-probabilities within 2e-3; without the server's packages that part is left out, and told so.
`--write` writes down what transformers says, for the tests that run without torch.  Exits with 0 if all holds, else
with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # run as a file
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
)  # of servers

if find_spec("torch") is None:
    sys.exit("This comparison needs torch: make install EXTRAS=dev,parity")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from jaxserve.loading.weights import load_model  # noqa: E402
from tests.models.vision_cases import (  # noqa: E402
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
from tests.models.vision_run import SeeingModel  # noqa: E402
from tests.parity.qwen_vl_reference import Reference  # noqa: E402

TOLERANCE = 2e-3  # of logits


class TurnReference:
    """The reference, asked by turns."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def logits(self, turn: Turn) -> np.ndarray:
        """Logits [T, V]."""
        is_image = [False] * len(turn.token_ids)
        for image in turn.images:
            is_image[image.offset : image.offset + image.num_tokens] = [True] * image.num_tokens
        pixels = np.concatenate([pixel_values(image) for image in turn.images]) if turn.images else None
        return self._reference.logits(
            turn.token_ids, is_image, pixels, [image.grid_thw for image in turn.images]
        )


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
    moved = replace(image, offset=image.offset + start)
    return Turn([*turn.token_ids, *said, *more.token_ids], (*turn.images, moved))


def _over_http(name: str, reference: Reference) -> bool:
    if find_spec("quart") is None or find_spec("openai") is None:
        print(
            f"{name} over HTTP: left out, since the server's packages or the openai client are not installed"
        )
        return True
    from tests.parity.qwen_vl_http import compare_over_http

    return compare_over_http(name, reference)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare models that see with transformers, in float32.")
    parser.add_argument("--write", action="store_true", help="write the goldens of the tests")
    arguments = parser.parse_args()
    passed, written = True, {}
    for name in CONFIGS:
        ours = SeeingModel(nnx.merge(*load_model(checkpoint(name), jnp.dtype("float32"), progress=False)))
        torch_model = Reference(name)
        reference = TurnReference(torch_model)
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
        passed = _over_http(name, torch_model) and passed
    if arguments.write:
        GOLDENS.write_text(json.dumps(written, indent=1) + "\n")
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
