"""Ask a running server a question with the `openai` client: plain, then streamed.

python examples/chat.py [BASE_URL]      (default: $OPENAI_BASE_URL or http://127.0.0.1:8000/v1)
"""

from __future__ import annotations

import sys

from server_client import DEFAULT_URL, OpenAI, connected

QUESTION = "What is the capital of France? Answer in one sentence."


def main() -> None:
    with connected(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_URL) as (client, model):
        ask(client, model)


def ask(client: OpenAI, model: str) -> None:
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
