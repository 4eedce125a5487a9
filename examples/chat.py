"""Ask a running server a question with the `openai` client: plain, then streamed.

python examples/chat.py [BASE_URL]      (default: $OPENAI_BASE_URL or http://127.0.0.1:8000/v1)
"""

from __future__ import annotations

import os
import sys

try:
    from openai import APIConnectionError, OpenAI
except ImportError:
    sys.exit("This example needs the `openai` package: pip install openai (or run it with .venv/bin/python)")

DEFAULT_URL = "http://127.0.0.1:8000/v1"
QUESTION = "What is the capital of France? Answer in one sentence."


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", DEFAULT_URL)
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        model = client.models.list().data[0].id
    except APIConnectionError:
        sys.exit(f"Nobody answers at {base_url}: start the server first (make serve)")

    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=64
    )
    print(answer.choices[0].message.content)

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=64,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
