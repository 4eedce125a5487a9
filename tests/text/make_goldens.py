"""Trains two small SentencePiece models and records how SentencePiece itself encodes with them.

Needs the `sentencepiece` package, which the tests do not: python -m tests.text.make_goldens
"""

from __future__ import annotations

import io
import json
import random
import tempfile
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "text"
FOREIGN = [
    "Das Übliche: schöne Grüße aus Köln.",
    "L'été à la plage, déjà vu.",
    "你好，世界！",
    "こんにちは世界",
    "Привет, мир!",
]
TEXTS = [
    "Hello world",
    "  two  spaces ",
    "",
    "a",
    " ",
    "\n\nnew\tline\r\n",
    "你好，世界！🎉 ok",
    "Übergrößenträger",
    "naïve café 12345 67",
    "x" * 40,
    "aaaaaaaaaaa",
    "the the the",
    "\u0000\u0001 control",
    "ﬁ ligature ½",
    "e\u0301 combining",
]


def main() -> None:
    """Write tests/data/text/spm_*.model and .json."""
    corpus = [line for line in (ROOT / "LICENSE").read_text().splitlines() if line.strip()] + FOREIGN * 20
    rng = random.Random(0)
    words = " ".join(corpus).split()
    texts = [*TEXTS, *(" ".join(rng.choices(words, k=rng.randrange(1, 12))) for _ in range(40))]
    texts += ["".join(rng.choices("abcdefgh iouäß你🎉 \n", k=rng.randrange(1, 30))) for _ in range(40)]
    for name, add_dummy_prefix in (("spm_prefix", True), ("spm_no_prefix", False)):
        model = io.BytesIO()
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(corpus))
            file.flush()
            sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue] - made by SWIG
                input=file.name,
                model_writer=model,
                vocab_size=600,
                model_type="bpe",
                byte_fallback=True,
                character_coverage=0.98,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["<|tool|>"],
                add_dummy_prefix=add_dummy_prefix,
                minloglevel=2,
            )
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        cases = [{"text": text, "ids": processor.encode(text)} for text in texts]
        (DATA / f"{name}.model").write_bytes(model.getvalue())
        (DATA / f"{name}.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
