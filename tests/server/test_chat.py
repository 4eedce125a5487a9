"""Chat answers that are not streamed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from jaxserve.engine.protocol import CoreRequest
from jaxserve.outputs import Logprob
from jaxserve.server import ServerSettings
from jaxserve.server import logprobs as logprobs_module
from tests.scripted import drawing, echo, saying
from tests.server.serving import PARIS, QUESTION, say, serving
from tests.tiny import BOS, EOS, IM_END, byte_tokenizer


def prompt_of(request: CoreRequest) -> str:
    return byte_tokenizer().decode(request.prompt_token_ids, skip_special_tokens=False)


async def test_a_plain_answer_holds_what_openai_requires_and_no_more():
    with serving() as served:
        body = (await served.chat()).json
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("jaxserve-")
    assert body == {
        "object": "chat.completion",
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": PARIS, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 49, "total_tokens": 81, "completion_tokens": 32},
    }


async def test_prompt_is_the_rendered_conversation():
    with serving() as served:
        await served.chat(
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None},
                {"role": "wizard", "content": "c"},
            ]
        )
        assert prompt_of(served.engine.submitted[0]) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
            "<|im_start|>assistant\n<|im_end|>\n<|im_start|>wizard\nc<|im_end|>\n<|im_start|>assistant\n"
        )


async def test_continue_final_message_needs_no_second_flag():
    with serving(say(" Paris.")) as served:
        messages = [*QUESTION, {"role": "assistant", "content": "It is"}]
        answer = await served.chat(messages=messages, continue_final_message=True, echo=True)
        assert prompt_of(served.engine.submitted[0]).endswith("<|im_start|>assistant\nIt is")
        assert answer.json["choices"][0]["message"]["content"] == "It is Paris."


async def test_template_variables():
    template = "{{ messages[0].content }}|{{ color }}|{{ reasoning_effort }}|{{ documents[0].text }}"
    with serving(chat_template=template) as served:
        answer = await served.chat(
            messages=[{"role": "user", "content": "hi"}],
            chat_template_kwargs={"color": "red"},
            reasoning_effort="low",
            documents=[{"text": "doc"}],
        )
        assert answer.status == 200
        assert prompt_of(served.engine.submitted[0]) == "hi|red|low|doc"


async def test_tools_under_choice_none_are_the_templates_business():
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    with serving() as served:
        answer = await served.chat(tools=[tool], tool_choice="none")
        assert answer.status == 200
        assert "get_weather" in prompt_of(served.engine.submitted[0])


async def test_the_server_and_the_front_end_render_alike():
    fields: dict[str, Any] = {
        "messages": [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "The"}]}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "documents": [{"text": "D"}],
        "chat_template_kwargs": {"color": "red"},
        "continue_final_message": True,
    }
    template = "{{ tools }}{{ documents }}{{ color }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    for content_format in ("auto", "string", "openai"):
        with serving(chat_template=template, chat_template_content_format=content_format) as served:
            assert (await served.chat(**fields, tool_choice="none")).status == 200
            own = served.llm.render_chat(**fields, chat_template_content_format=content_format)
            long = await served.post("/tokenize", {**fields, "prompt": None, "user": "x" * 10_000})
            assert served.engine.submitted[0].prompt_token_ids == own.token_ids == long.json["tokens"]


async def test_special_tokens_are_the_templates_business():
    with serving() as served:
        await served.chat()
        assert BOS not in served.engine.submitted[0].prompt_token_ids


async def test_chat_template_of_the_operator_and_of_the_request():
    own = "{% for m in messages %}{{ m.content }};{% endfor %}"
    with serving(chat_template=None, trust_request_chat_template=True) as served:
        refused = await served.chat()
        assert refused.status == 400
        assert "no chat template" in refused.error["message"]
        assert (await served.chat(chat_template=own)).status == 200
        assert prompt_of(served.engine.submitted[0]) == "What is the capital of France?;"
        broken = await served.chat(chat_template="{% for %}")
        assert broken.status == 400
        assert broken.error["param"] == "chat_template"


def test_chat_template_setting():
    assert ServerSettings(chat_template="{{ messages }}").chat_template == "{{ messages }}"


async def test_every_sampling_field_reaches_the_engine():
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "seed": 11,
        "min_tokens": 2,
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "logit_bias": {"65": -100},
        "allowed_token_ids": [65, 66],
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 3,
        "max_tokens": 9,
        "bad_words": ["no"],
        "priority": -3,
        "cache_salt": "mine",
        "ignore_eos": True,
    }
    with serving() as served:
        assert (await served.chat(**fields)).status == 200
        (core,) = served.engine.submitted
    for name, value in fields.items():
        if name in ("logprobs", "top_logprobs", "bad_words", "priority", "cache_salt", "ignore_eos"):
            continue
        wanted = {65: -100.0} if name == "logit_bias" else tuple(value) if isinstance(value, list) else value
        holder = core if name == "stop_token_ids" else core.params
        assert getattr(holder, name) == wanted, name
    assert core.params.logprobs == 3
    assert core.priority == -3
    assert core.cache_salt == "mine"
    assert core.eos_token_ids == ()
    assert (110, 111) in core.bad_word_ids


async def test_defaults_come_from_the_model():
    with serving(sampling={"temperature": 0.25, "top_k": 3, "max_tokens": 5}) as served:
        await served.chat(max_tokens=None, temperature=None, top_k=9)
        (core,) = served.engine.submitted
        assert (core.params.temperature, core.params.top_k, core.params.max_tokens) == (0.25, 9, 5)


async def test_a_models_own_sixteen_tokens_are_meant():
    with serving(sampling={"max_tokens": 16}) as served:
        choice = (await served.chat(max_tokens=None)).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (PARIS[:16], "length")


async def test_without_max_tokens_the_context_is_the_limit():
    with serving() as served:
        await served.chat(max_tokens=None)
        assert served.engine.submitted[0].params.max_tokens == 512 - 49


async def test_max_completion_tokens_wins():
    with serving() as served:
        answer = await served.chat(max_tokens=2, max_completion_tokens=5)
        choice = answer.json["choices"][0]
        assert choice["message"]["content"] == "The c"
        assert choice["finish_reason"] == "length"


async def test_max_tokens_that_do_not_fit_are_cut_and_said():
    with serving() as served:
        answer = await served.chat(max_tokens=500)
        assert answer.headers["x-max-tokens-reduced"] == str(512 - 49)
        assert "x-max-tokens-reduced" not in (await served.chat(max_tokens=100)).headers
        assert "x-max-tokens-reduced" not in (await served.chat(max_tokens=None)).headers


async def test_n_answers():
    with serving(drawing([97, 98, 99], 6)) as served:
        seeded = (await served.chat(n=3, seed=5)).json
        assert [choice["index"] for choice in seeded["choices"]] == [0, 1, 2]
        assert len({choice["message"]["content"] for choice in seeded["choices"]}) > 1
        assert seeded["usage"]["completion_tokens"] == 21
        greedy = (await served.chat(n=2, temperature=0)).json
        assert [choice["message"]["content"] for choice in greedy["choices"]] == ["aaaaaa", "aaaaaa"]


@pytest.mark.parametrize(
    ("fields", "content", "stop_reason"),
    [
        ({"stop": "France"}, "The capital of ", "France"),
        ({"stop": ["x", "y", "z", "q", "is"]}, "The capital of France ", "is"),
        ({"stop": ["Paris"], "include_stop_str_in_output": True}, "The capital of France is Paris", "Paris"),
        ({"stop": None}, PARIS, None),
        ({"stop_token_ids": [ord("o")]}, "The capital ", ord("o")),
    ],
)
async def test_stops(fields: dict[str, Any], content: str, stop_reason: Any):
    with serving() as served:
        choice = (await served.chat(**fields)).json["choices"][0]
        assert choice["message"]["content"] == content
        assert choice["finish_reason"] == "stop"
        assert choice.get("stop_reason") == stop_reason
        assert ("stop_reason" in choice) == (stop_reason is not None)


async def test_only_a_further_end_token_is_a_stop_reason():
    script = saying([*b"one", IM_END, *b"two"])
    with serving(script, eos_token_ids=(EOS, IM_END)) as served:
        first = (await served.chat()).json["choices"][0]
        assert (first["message"]["content"], first["finish_reason"]) == ("one", "stop")
        assert first["stop_reason"] == IM_END
        longer = (await served.chat(ignore_eos=True, max_tokens=9)).json["choices"][0]
        assert (longer["message"]["content"], longer["finish_reason"]) == ("onetwoon", "length")
    with serving(say("one"), eos_token_ids=(EOS, IM_END)) as served:
        choice = (await served.chat(stop_token_ids=[EOS])).json["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert "stop_reason" not in choice


@pytest.mark.parametrize("door", ["chat", "complete"])
async def test_many_logprobs_are_written_beside_the_event_loop(door: str, monkeypatch: pytest.MonkeyPatch):
    threads: list[threading.Thread] = []
    honest = logprobs_module._most_likely

    def noting(candidates: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
        threads.append(threading.current_thread())
        return honest(candidates, count)

    monkeypatch.setattr(logprobs_module, "_most_likely", noting)
    with serving() as served:
        fields = {"logprobs": True, "top_logprobs": 1} if door == "chat" else {"logprobs": 1}
        ask = served.chat if door == "chat" else served.complete
        short = (await ask(**fields, max_tokens=5)).json
        assert set(threads) == {threading.current_thread()}
        threads.clear()
        long = (await ask(**fields, max_tokens=20, n=8)).json
        assert threads
        assert threading.current_thread() not in threads
        assert [set(choice) for choice in long["choices"]] == [set(short["choices"][0])] * 8


async def test_logprobs():
    with serving(say("é!")) as served:
        choice = (await served.chat(logprobs=True, top_logprobs=2, max_tokens=3)).json["choices"][0]
        assert set(choice["logprobs"]) == {"content", "refusal"}
        assert choice["logprobs"]["refusal"] is None
        content = choice["logprobs"]["content"]
        assert [entry["token"] for entry in content] == ["", "é", "!"]
        assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "é!"
        for entry in content:
            assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
            assert len(entry["top_logprobs"]) == 2
            values = [top["logprob"] for top in entry["top_logprobs"]]
            assert values == sorted(values, reverse=True)
        bare = (await served.chat(logprobs=True, max_tokens=3)).json["choices"][0]["logprobs"]["content"]
        assert [entry["top_logprobs"] for entry in bare] == [[], [], []]


async def test_tokens_as_token_ids():
    with serving(say("ab"), return_tokens_as_token_ids=True) as served:
        body = (await served.chat(logprobs=True, top_logprobs=1, max_tokens=2)).json
        first = body["choices"][0]["logprobs"]["content"][0]
        assert first["token"] == "token_id:97"
        assert first["bytes"] == [97]
        assert first["top_logprobs"][0]["token"].startswith("token_id:")
        body = (await served.chat(logprobs=True, max_tokens=2, return_tokens_as_token_ids=False)).json
        assert body["choices"][0]["logprobs"]["content"][0]["token"] == "a"


async def test_token_ids_and_prompt_logprobs_come_when_asked_for():
    with serving(say("ab")) as served:
        body = (await served.chat(return_token_ids=True, max_tokens=2, prompt_logprobs=1)).json
        assert body["choices"][0]["token_ids"] == [97, 98]
        assert body["prompt_token_ids"] == served.engine.submitted[0].prompt_token_ids
        assert len(body["prompt_logprobs"]) == 49
        assert body["prompt_logprobs"][0] is None
        own = str(body["prompt_token_ids"][1])
        entry = body["prompt_logprobs"][1]
        assert next(iter(entry)) == own
        assert set(entry[own]) == {"logprob", "rank", "decoded_token"}


async def test_truncated_prompt():
    with serving(echo) as served:
        body = (await served.chat(truncate_prompt_tokens=10, return_token_ids=True)).json
        assert len(body["prompt_token_ids"]) == 10
        assert body["usage"]["prompt_tokens"] == 10
        long = [{"role": "user", "content": "x" * 700}]
        body = (await served.chat(messages=long, truncate_prompt_tokens=-1, max_tokens=12)).json
        assert body["usage"]["prompt_tokens"] == 500


async def test_cached_tokens_are_told_where_the_operator_wants_it():
    with serving(engine={"num_cached_tokens": 16}, enable_prompt_tokens_details=True) as served:
        usage = (await served.chat()).json["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_unknown_fields_are_named():
    with serving() as served:
        answer = await served.chat(
            top_a=0.5, verbosity="low", stream=True, stream_options={"include_obfuscation": False}
        )
        assert answer.status == 200
        assert answer.headers["x-ignored-params"] == "top_a, verbosity, stream_options.include_obfuscation"
        answer = await served.chat(**{"a\r\nSet-Cookie: x": 1, "ü": 2})
        assert answer.headers["x-ignored-params"] == "a%0D%0ASet-Cookie%3A%20x, %C3%BC"
        known = await served.chat(
            user="me", metadata={"a": "b"}, response_format={"type": "text"}, use_beam_search=False,
            parallel_tool_calls=True, include_reasoning=True, tool_choice="none", thinking_token_budget=-1,
            truncation_side="left", stream_interval=1, vllm_xargs={}, n=2, best_of=2,
        )  # fmt: skip
        assert known.status == 200
        assert "x-ignored-params" not in known.headers


async def test_strict_params():
    with serving(strict_params=True) as served:
        answer = await served.chat(temprature=1)
        assert answer.status == 400
        assert answer.error["param"] == "temprature"
        assert answer.error["message"] == "Unknown field 'temprature'. Did you mean temperature?"
        answer = await served.chat(stream=True, stream_options={"include_usages": True})
        assert "Did you mean stream_options.include_usage?" in answer.error["message"]
        assert (await served.chat(zzzzzz=1)).error["message"] == "Unknown field 'zzzzzz'."
        assert (await served.chat()).status == 200


async def test_request_ids():
    with serving() as served:
        named = await served.post(
            "/v1/chat/completions",
            {"messages": QUESTION, "request_id": "in-the-body"},
            **{"X-Request-Id": "in-the-header"},
        )
        assert named.json["id"] == "chatcmpl-in-the-header"
        assert named.headers["x-request-id"] == "in-the-header"
        named = await served.chat(request_id="in-the-body")
        assert named.json["id"] == "chatcmpl-in-the-body"
        assert named.headers["x-request-id"] == "in-the-body"
        plain = await served.chat()
        assert plain.json["id"] == "chatcmpl-" + plain.headers["x-request-id"]
        bad = await served.post("/v1/chat/completions", {"messages": QUESTION}, **{"X-Request-Id": "a b"})
        assert bad.status == 400
        assert bad.error["param"] == "X-Request-Id"


async def test_long_conversations_are_rendered_elsewhere():
    with serving(info={"max_model_len": 200_000}) as served:
        answer = await served.chat(messages=[{"role": "user", "content": "x" * 100_000}])
        assert answer.json["usage"]["prompt_tokens"] > 100_000
