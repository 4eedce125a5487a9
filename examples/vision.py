"""Ask about a photograph: over HTTP with the `openai` client, or in this process with a PIL image.

python examples/vision.py PHOTO [BASE_URL]       (default: $OPENAI_BASE_URL or http://127.0.0.1:8000/v1)
python examples/vision.py PHOTO --model MODEL    (a Qwen2-VL or Qwen2.5-VL, loaded here)
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from PIL import Image

QUESTION = "What does this picture show?"


def main() -> None:
    match sys.argv[1:]:
        case [photo, "--model", model]:
            ask_here(Path(photo), model)
        case [photo]:
            ask_server(Path(photo))
        case [photo, base_url]:
            ask_server(Path(photo), base_url)
        case _:
            sys.exit(__doc__)


def ask_server(photo: Path, base_url: str | None = None) -> None:
    """The picture goes with the request, as base64: a server fetches nothing unless its operator allows it."""
    from server_client import DEFAULT_URL, connected

    try:
        encoded = base64.b64encode(photo.read_bytes()).decode()
    except OSError as error:
        sys.exit(f"{photo}: {error.strerror}")
    with connected(base_url or DEFAULT_URL, start_it="jaxserve serve, with a Qwen2-VL or Qwen2.5-VL") as (
        client,
        model,
    ):
        stream = client.chat.completions.create(
            model=model,
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
    from jaxserve.errors import JaxserveError

    try:
        image = Image.open(photo)
        image.load()
    except OSError as error:  # also what PIL raises for a file that is no picture
        sys.exit(f"{photo}: {error.strerror or error}")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": QUESTION}]
    try:
        with LLM(model) as llm:
            [output] = llm.chat(
                [{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=128)
            )
    except JaxserveError as error:  # a model that takes no images, a directory without weights
        sys.exit(str(error))
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
