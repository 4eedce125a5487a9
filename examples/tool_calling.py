"""Let a model call a function: asked to, made to call one by name, streamed, and answering with the result.

jaxserve serve qwen2.5-coder-0.5b --enable-auto-tool-choice --tool-call-parser hermes --max-model-len 4096
python examples/tool_calling.py [BASE_URL]      (default: $OPENAI_BASE_URL or http://127.0.0.1:8000/v1)

The exit status is 1, with a line that says why, when a step does not do what it should.  This small model was not
trained to begin a call by itself (it gives the <tool_call> token a log-probability of -23), so its calls are asked for
with tool_choice "required" and by name; with "auto" it answers in words.  Larger models call under "auto" too.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from server_client import DEFAULT_URL, OpenAI, connected

BY_NAME: Any = {"type": "function", "function": {"name": "get_weather"}}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a given location",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "City name"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["location", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


def get_weather(location: str, unit: str) -> dict[str, Any]:
    """The function that the model may call: a weather service that is always right."""
    celsius, sky = {"San Francisco": (17, "clear"), "Dallas": (31, "cloudy")}.get(location, (20, "misty"))
    temperature = celsius if unit == "celsius" else round(celsius * 9 / 5 + 32)
    return {"location": location, "temperature": temperature, "unit": unit, "sky": sky}


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_URL
    with connected(base_url, start_it="see the top of this file") as (client, model):
        converse(client, model)


def converse(client: OpenAI, model: str) -> None:
    messages = [user("What's the weather like in San Francisco in celsius?")]
    call, finish_reason = whole_call(client, model, messages, "required")
    print(f"required: {shown(call)}")
    check(finish_reason == "tool_calls", f"finish_reason is {finish_reason!r}")
    check(
        json.loads(call["function"]["arguments"]) == {"location": "San Francisco", "unit": "celsius"},
        "arguments",
    )

    messages += [assistant(call), result_of(call), user("Now answer my question in one sentence.")]
    answer = whole_answer(client, model, messages)
    print(f"with its result, auto: {answer}")
    check("17" in answer, "the answer does not use the tool's result")

    messages += [{"role": "assistant", "content": answer}, user("And in Dallas in fahrenheit?")]
    print("by name, streamed: ", end="")
    call, finish_reason = streamed_call(client, model, messages, BY_NAME)
    check(finish_reason == "tool_calls", f"finish_reason is {finish_reason!r}")
    check(
        json.loads(call["function"]["arguments"]) == {"location": "Dallas", "unit": "fahrenheit"}, "arguments"
    )
    again, _ = whole_call(client, model, messages, BY_NAME)
    check(again["function"] == call["function"], f"not streamed it is {shown(again)}")

    messages += [assistant(call), result_of(call), user("Now answer my question in one sentence.")]
    print("with its result, streamed: ", end="")
    answer = streamed_answer(client, model, messages)
    check("88" in answer, "the answer does not use the tool's result")


def whole_call(
    client: OpenAI, model: str, messages: list[Any], tool_choice: Any
) -> tuple[dict[str, Any], str]:
    """The one call that the model makes, and why its answer ended."""
    completion = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=TOOLS,
        tool_choice=tool_choice,
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    )
    choice = completion.choices[0]
    calls = choice.message.tool_calls or []
    check(len(calls) == 1, f"one call was to be made, not {len(calls)}: {choice.message.content!r}")
    return calls[0].model_dump(), choice.finish_reason


def streamed_call(
    client: OpenAI, model: str, messages: list[Any], tool_choice: Any
) -> tuple[dict[str, Any], str | None]:
    """The same, put together and printed as it comes."""
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=TOOLS,
        tool_choice=tool_choice,
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
        stream=True,
    )
    call: dict[str, Any] = {}
    finish_reason = None
    for chunk in stream:
        choice = chunk.choices[0]
        finish_reason = choice.finish_reason or finish_reason
        for piece in choice.delta.tool_calls or []:
            assert piece.function is not None
            if piece.id is not None:  # the first piece of a call names it
                check(not call, "one call was to be made, and another one has begun")
                call = {"id": piece.id, "type": "function"}
                call["function"] = {"name": piece.function.name, "arguments": ""}
                print(f"{piece.function.name} ", end="", flush=True)
            if piece.function.arguments:
                call["function"]["arguments"] += piece.function.arguments
                print(piece.function.arguments, end="", flush=True)
    print()
    check(bool(call), "no call was made")
    return call, finish_reason


def whole_answer(client: OpenAI, model: str, messages: list[Any]) -> str:
    """What the model says; it may call again, and may do without."""
    completion = client.chat.completions.create(
        model=model, messages=messages, tools=TOOLS, tool_choice="auto", temperature=0, max_tokens=60
    )
    message = completion.choices[0].message
    check(not message.tool_calls, f"an answer in words was to come, not {message.tool_calls}")
    return message.content or ""


def streamed_answer(client: OpenAI, model: str, messages: list[Any]) -> str:
    """The same, printed as it comes."""
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=TOOLS,
        tool_choice="auto",
        temperature=0,
        max_tokens=60,
        stream=True,
    )
    answer = ""
    for chunk in stream:
        check(not chunk.choices[0].delta.tool_calls, "an answer in words was to come, not a call")
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def result_of(call: dict[str, Any]) -> dict[str, Any]:
    """The message that tells the model what its call gave."""
    check(call["function"]["name"] == "get_weather", f"there is no function {call['function']['name']!r}")
    result = get_weather(**json.loads(call["function"]["arguments"]))
    print(f"get_weather gives {result}")
    return {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)}


def shown(call: dict[str, Any]) -> str:
    return f"{call['function']['name']} {call['function']['arguments']}"


def check(is_right: bool, otherwise: str) -> None:
    if not is_right:
        sys.exit(f"failed: {otherwise}")


if __name__ == "__main__":
    main()
