"""Answer a batch of prompts in a script, without a server.

python examples/offline.py [MODEL]      (default: smollm2)
"""

from __future__ import annotations

import sys

from jaxserve import LLM, SamplingParams


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2")

    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=32)
    prompts = ["The first thing I saw on the moon was", "def fibonacci(n):", "Water boils at"]
    for output in llm.generate(prompts, params):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

    conversation = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    [output] = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=64))
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
