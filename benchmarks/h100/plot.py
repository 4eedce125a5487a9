"""`python -m benchmarks.h100.plot RESULTS.json [OUT.svg]`: decode steps against vLLM's and the floor."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.h100.models import HF_CONFIGS
from benchmarks.h100.parts import OUTPUT, PROMPT, SHORT
from benchmarks.h100.peer import PEER, floor_ms, peer_value
from jaxserve.config import ModelConfig
from jaxserve.loading.hf_config import model_config_from_hf

TITLES = {"8b": "Llama-3.1-8B", "1b": "Llama-3.2-1B"}


def decode_series(parts: dict[str, Any], model: str) -> dict[str, list[tuple[int, float]]]:
    """(batch, ms) by series of one model's decode part; the peer's only at batches that were measured."""
    config = _config(model)
    steps = {result["batch"]: result["decode_step_ms"] for result in parts[f"decode-{model}"]["batches"]}
    context = PROMPT + (OUTPUT + SHORT) // 2
    theirs = [(batch, ms) for batch in steps if (ms := peer_value(model, "decode_ms", batch)) is not None]
    return {
        PEER["engine"]: theirs,
        "jaxserve": list(steps.items()),
        "floor": [(batch, floor_ms(model, config, batch, context)) for batch in steps],
    }


def plot(results: dict[str, Any], out: Path) -> list[str]:
    """Draw a panel for each model that was measured; returns their names.  ValueError if there is none."""
    import matplotlib  # pyright: ignore[reportMissingImports]  # whoever plots has it; nothing else needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]  # likewise

    parts = results["parts"]
    models = [model for model in TITLES if f"decode-{model}" in parts]
    if not models:
        raise ValueError("the results hold no decode part of a model that has a place in the plot")
    figure, axes = pyplot.subplots(1, len(models), figsize=(5.2 * len(models), 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for name, points in decode_series(parts, model).items():
            style = "--" if name == "floor" else "o-"
            color = {"jaxserve": "tab:blue", "floor": "tab:gray"}.get(name, "tab:orange")
            axis.plot(
                [str(batch) for batch, _ in points], [ms for _, ms in points], style, color=color, label=name
            )
        axis.set(title=f"{TITLES[model]}, ms a decode step", xlabel="sequences in the batch", ylim=(0, None))
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False)
    about = parts[f"decode-{models[0]}"]
    day, source = about["date"][:10], f"{PEER['engine']}, {PEER['date']}"
    figure.text(0.01, 0.01, f"{about['device']}, bf16, {PROMPT} in; jaxserve {day}; {source}", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(out)
    pyplot.close(figure)
    return models


def _config(model: str) -> ModelConfig:
    return model_config_from_hf(HF_CONFIGS[model], model)


def main(argv: Sequence[str]) -> int:
    """Plot one results file."""
    if not 1 <= len(argv) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(argv[0])
    out = Path(argv[1]) if len(argv) == 2 else source.with_suffix(".svg")
    models = plot(json.loads(source.read_text(encoding="utf-8")), out)
    print(f"wrote {out}: {', '.join(models)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
