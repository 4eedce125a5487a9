"""The reference side for models that see: transformers in float32 with the weights of tests/models/vision_cases.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]  # comes with the extra parity
import transformers

from tests.models.vision_cases import CONFIGS, checkpoint


class Reference:
    """A model of vision_cases in transformers."""

    def __init__(self, name: str) -> None:
        family = "Qwen2VL" if name == "qwen2_vl" else "Qwen2_5_VL"
        config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(CONFIGS[name])))
        config._attn_implementation = "eager"
        self._model = getattr(transformers, f"{family}ForConditionalGeneration")(config).float().eval()
        weights = {_newer_name(key): torch.tensor(value) for key, value in checkpoint(name).weights.items()}
        missing, left_over = self._model.load_state_dict(weights, strict=False)
        assert not left_over, left_over
        assert set(missing) <= {"lm_head.weight"}, missing
        self._model.tie_weights()

    @torch.inference_mode()
    def logits(
        self,
        token_ids: Sequence[int],
        is_image: Sequence[bool],
        pixel_values: np.ndarray | None,
        grids: Sequence[tuple[int, int, int]],
    ) -> np.ndarray:
        """Logits [T, V] in one pass without a cache; `is_image` of the first tokens, the others are text."""
        ids = torch.tensor([list(token_ids)])
        inputs: dict[str, Any] = {}
        if grids:
            kinds = torch.zeros_like(ids)
            kinds[0, : len(is_image)] = torch.tensor(is_image, dtype=ids.dtype)
            inputs = {
                "pixel_values": torch.tensor(pixel_values),
                "image_grid_thw": torch.tensor(grids),
                "mm_token_type_ids": kinds,
            }
        self._model.model.rope_deltas = None
        return self._model(input_ids=ids, use_cache=False, **inputs).logits[0].numpy()


def _newer_name(name: str) -> str:
    """What transformers calls a tensor today."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
