"""Ask about a photograph: over HTTP with the `openai` client, or in this process with a PIL image.

python examples/vision.py PHOTO [BASE_URL]       (default: $OPENAI_BASE_URL or http://127.0.0.1:8000/v1)
python examples/vision.py PHOTO --model MODEL    (a Qwen2-VL or Qwen2.5-VL, loaded here)
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

from PIL import Image

DEFAULT_URL = "http://127.0.0.1:8000/v1"
QUESTION = "What does this picture show?"


def main() -> None:
    match sys.argv[1:]:
        case [photo, "--model", model]:
            ask_here(Path(photo), model)
        case [photo]:
            ask_server(Path(photo), os.environ.get("OPENAI_BASE_URL", DEFAULT_URL))
        case [photo, base_url]:
            ask_server(Path(photo), base_url)
        case _:
            sys.exit(__doc__)


def ask_server(photo: Path, base_url: str) -> None:
    """The picture goes with the request, as base64: a server fetches nothing unless its operator allows it."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    encoded = base64.b64encode(photo.read_bytes()).decode()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/*;base64,{encoded}"}},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ],
        temperature=0,
        max_tokens=128,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


def ask_here(photo: Path, model: str) -> None:
    """The same without a server."""
    from jaxserve import LLM, SamplingParams

    content = [
        {"type": "image_pil", "image_pil": Image.open(photo)},
        {"type": "text", "text": QUESTION},
    ]
    with LLM(model) as llm:
        [output] = llm.chat(
            [{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=128)
        )
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
