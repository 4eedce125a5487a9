"""Stream several answers at once inside an asyncio program, without a server.

python examples/async_streaming.py [MODEL]      (default: smollm2)
"""

from __future__ import annotations

import asyncio
import sys

from jaxserve import AsyncLLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.sampling_params import OutputKind

PROMPTS = {
    "sea": "The sea was calm that morning, and",
    "city": "The city never slept, because",
    "numbers": "One, two, three, four,",
}


async def tell(llm: AsyncLLM, name: str, prompt: str, max_chunks: int | None = None) -> None:
    """Print an answer piece by piece; leaving early aborts the request and frees its memory at once."""
    params = SamplingParams(temperature=0, max_tokens=24, output_kind=OutputKind.DELTA)
    num_chunks = 0
    async with llm.generate(prompt, params) as stream:
        async for output in stream:
            print(f"[{name}] {output.outputs[0].text!r}")
            num_chunks += 1
            if num_chunks == max_chunks:
                print(f"[{name}] that is enough")
                break


async def main() -> None:
    llm = AsyncLLM.from_engine_config(EngineConfig(model=sys.argv[1] if len(sys.argv) > 1 else "smollm2"))
    try:
        async with asyncio.TaskGroup() as group:
            for name, prompt in PROMPTS.items():
                group.create_task(tell(llm, name, prompt, max_chunks=5 if name == "numbers" else None))
    finally:
        llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
