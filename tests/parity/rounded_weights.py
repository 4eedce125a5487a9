"""What rounding the weights to bfloat16 does by itself: `python tests/parity/rounded_weights.py [MODEL …]`.

Reads the recorded answers of tests/real_models with rounded weights and float32 arithmetic, and prints how far their
tokens' log-probabilities are from the recorded ones, transformers' in float32.  Arithmetic in bfloat16 comes on top.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from jaxserve import LLM
from jaxserve.loading.fetch import FETCHABLE_MODELS, models_directory
from tests.real_models.answer_gaps import answer_gaps, describe
from tests.real_models.bfloat16_directory import write_bfloat16_directory
from tests.real_models.test_goldens import NUM_TOKENS, read_goldens


def main() -> None:
    """A line for each model."""
    for model in sys.argv[1:] or sorted(NUM_TOKENS, reverse=True):
        file = models_directory() / FETCHABLE_MODELS[model].file_name
        with tempfile.TemporaryDirectory() as folder:
            write_bfloat16_directory(file, Path(folder))
            options = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 128}
            with LLM(folder, tokenizer=str(file), dtype="float32", **options) as llm:
                print(f"{model}: {describe(answer_gaps(llm, read_goldens(model)))}", flush=True)


if __name__ == "__main__":
    main()
