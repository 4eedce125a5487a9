"""Requests that cannot be answered: each is told which field is wrong, and nothing else is disturbed."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from jaxserve.errors import EngineDeadError, QueueFullError
from jaxserve.server.errors import to_api_error
from jaxserve.server.validation import json_object
from tests.scripted import echo
from tests.server.serving import PARIS, QUESTION, serving

JSON = {"Content-Type": "application/json"}

TOOL = {"type": "function", "function": {"name": "f"}}

CHAT = [
    ({"messages": []}, "messages", "messages must have at least one message"),
    ({"messages": None}, "messages", "messages must be a list, got None"),
    ({"messages": "hello"}, "messages", "messages must be a list, got 'hello'"),
    ({"messages": [{"content": "hi"}]}, "messages", "messages[0] must be an object with a role"),
    ({"messages": ["hi"]}, "messages", "messages[0] must be an object with a role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages", "messages[0].content must be a string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
        "messages[0].content[0] is of type 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "512 tokens"),
    ({"messages": [{"role": "user"}] * 513}, "messages", "512 tokens, and messages has 513 messages"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens must be at least 1, got -1."),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
    (
        {"max_completion_tokens": 0},
        "max_completion_tokens",
        "max_completion_tokens must be at least 1, got 0.",
    ),
    ({"max_tokens": "ten"}, "max_tokens", "max_tokens must be an integer, got 'ten'."),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens must be an integer, got 1.5."),
    (
        {"max_tokens": 513},
        "max_tokens",
        "max_tokens must be at most the model's context of 512 tokens, got 513.",
    ),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "min_tokens must be at most max_tokens (2), got 3."),
    ({"min_tokens": -1}, "min_tokens", "min_tokens must be at least 0, got -1."),
    ({"temperature": 3}, "temperature", "temperature must be in [0, 2], got 3.0."),
    ({"temperature": -1}, "temperature", "temperature must be in [0, 2], got -1.0."),
    ({"temperature": "hot"}, "temperature", "temperature must be a number, got 'hot'."),
    ({"temperature": "inf"}, "temperature", "temperature must be in [0, 2], got inf."),
    ({"top_p": 0}, "top_p", "top_p must be in (0, 1], got 0.0."),
    ({"top_p": 1.5}, "top_p", "top_p must be in (0, 1], got 1.5."),
    ({"top_k": -2}, "top_k", "top_k must be"),
    ({"min_p": 2}, "min_p", "min_p must be in [0, 1], got 2.0."),
    ({"presence_penalty": 2.5}, "presence_penalty", "presence_penalty must be in [-2, 2], got 2.5."),
    ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty must be in [-2, 2], got -3.0."),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty must be above 0"),
    ({"n": 0}, "n", "n must be at least 1, got 0."),
    ({"n": -1}, "n", "n must be at least 1, got -1."),
    ({"n": 129}, "n", "n must be at most 128, got 129."),
    ({"seed": "abc"}, "seed", "seed must be an integer, got 'abc'."),
    ({"seed": 2**70}, "seed", "seed must be"),
    ({"stop": ""}, "stop", "stop must be non-empty strings"),
    ({"stop": ["a", ""]}, "stop", "stop must be non-empty strings"),
    ({"stop": 5}, "stop", "stop must be a list, got 5."),
    ({"stop": [5]}, "stop", "stop[0] must be a string, got 5."),
    ({"stop_token_ids": ["a"]}, "stop_token_ids", "stop_token_ids[0] must be an integer, got 'a'."),
    ({"stop_token_ids": [999]}, "stop_token_ids", "outside the vocabulary of 262: [999]"),
    ({"allowed_token_ids": [999]}, "allowed_token_ids", "outside the vocabulary of 262: [999]"),
    (
        {"allowed_token_ids": [1] * 263},
        "allowed_token_ids",
        "at most 262 entries, the vocabulary's, got 263.",
    ),
    ({"allowed_token_ids": []}, "allowed_token_ids", "allowed_token_ids must be at least one token id"),
    ({"bad_words": [""]}, "bad_words", "bad_words must be non-empty strings"),
    ({"logit_bias": {"Paris": 5}}, "logit_bias", "'Paris' is not a token id"),
    ({"logit_bias": {"99999": 5}}, "logit_bias", "outside the vocabulary of 262: [99999]"),
    ({"logit_bias": {"-1": 5}}, "logit_bias", "outside the vocabulary of 262: [-1]"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "'05' is not a token id"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias", "'1_0' is not a token id"),
    ({"logit_bias": {" 5": 1}}, "logit_bias", "' 5' is not a token id"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias", "is not a token id"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "is not a token id"),
    (
        {"logit_bias": {str(i): 1 for i in range(100_000)}},
        "logit_bias",
        "logit_bias must have at most 1024 entries, got 100000.",
    ),
    ({"stop": [f"s{i}" for i in range(100_000)]}, "stop", "stop must have at most 1024 strings"),
    ({"stop": "a" * 100_000}, "stop", "of 16384 characters together, got 1 of 100000."),
    ({"bad_words": ["a"] * 257}, "bad_words", "bad_words must have at most 256 strings"),
    ({"stop_token_ids": [5] * 1025}, "stop_token_ids", "stop_token_ids must have at most 1024 entries"),
    ({"n": 10**9}, "n", "n must be at most 128, got 1000000000."),
    ({"max_tokens": 10**30}, "max_tokens", "max_tokens must be at most the model's context of 512 tokens"),
    ({"min_tokens": 2**63}, "min_tokens", "min_tokens must be at most max_tokens (64)"),
    ({"seed": -(2**64)}, "seed", "seed must be a 64-bit integer"),
    ({"priority": 2**63}, "priority", "priority must be a 64-bit integer, got 9223372036854775808."),
    ({"stop_token_ids": [10**30]}, "stop_token_ids", "outside the vocabulary of 262"),
    ({"truncate_prompt_tokens": -(10**30)}, "truncate_prompt_tokens", "truncate_prompt_tokens must be -1"),
    ({"logit_bias": {"5": "much"}}, "logit_bias", "logit_bias.5 must be a number, got 'much'."),
    ({"logit_bias": [1]}, "logit_bias", "logit_bias must be an object, got a list of 1."),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "top_logprobs must be from 0 to 20, got 21."),
    ({"top_logprobs": -1, "logprobs": True}, "top_logprobs", "top_logprobs must be from 0 to 20, got -1."),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs: true."),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs must be at most 20, got 21."),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs must be at least 0, got -1."),
    (
        {"prompt_logprobs": 1, "stream": True},
        "prompt_logprobs",
        "prompt_logprobs is not available in a stream",
    ),
    ({"stream": "perhaps"}, "stream", "stream must be true or false, got 'perhaps'."),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream: true."),
    ({"stream_options": 3, "stream": True}, "stream_options", "stream_options must be an object, got 3."),
    (
        {"stream_options": {"include_usage": "x"}, "stream": True},
        "stream_options",
        "stream_options.include_usage must be true or false",
    ),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "continue_final_message and add_generation_prompt cannot both be true.",
    ),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens must be -1"),
    ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens", "to the context of 512 tokens, got 513"),
    ({"chat_template": "{{ messages }}"}, "chat_template", "chat_template is not accepted from requests"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "must not have 'tools'"),
    ({"reasoning_effort": "most"}, "reasoning_effort", "reasoning_effort must be one of 'none', 'minimal'"),
    ({"metadata": "x"}, "metadata", "metadata must be an object, got 'x'."),
    ({"request_id": "two words"}, "request_id", "request_id must be 1 to 128 printable ASCII characters"),
    ({"tools": []}, "tools", "tools must not be an empty array"),
    ({"tools": 3}, "tools", "tools must be a list, got 3."),
    ({"tools": [{"type": "function"}]}, "tools", "tools[0].function is required."),
    ({"tools": ["f"]}, "tools", "tools[0] must be an object, got 'f'."),
    ({"tools": [{"function": {"name": ""}}]}, "tools", "tools[0].function.name"),
    ({"tools": [{"function": {"name": 3}}]}, "tools", "tools[0].function.name must be a string, got 3."),
    (
        {"tools": [TOOL, {"function": {"name": "g", "parameters": "x"}}]},
        "tools",
        "tools[1].function.parameters must be an object, got 'x'.",
    ),
    (
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        "tools",
        "tools[0].type must be one of 'function'",
    ),
    ({"tools": [TOOL] * 10_000}, "tools", "at most 1024"),
    ({"tools": [TOOL]}, "tools", "requires --enable-auto-tool-choice and --tool-call-parser"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice", "requires --enable-auto-tool-choice"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "requires --tool-call-parser"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        "tool_choice with the function 'f' requires --tool-call-parser",
    ),
    ({"tool_choice": "auto"}, "tool_choice", "tool_choice needs tools"),
    ({"response_format": {"type": "yaml"}}, "response_format", "response_format.type must be one of 'text'"),
    ({"response_format": {}}, "response_format", "response_format.type is required."),
    ({"response_format": "text please"}, "response_format", "must be an object, got 'text please'."),
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format",
        "response_format.json_schema.name is required.",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format",
        "needs response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "y"}}},
        "response_format",
        "response_format.json_schema.schema must be an object, got 'y'.",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "needs response_format.format"),
    (
        {"response_format": {"type": "structural_tag", "structures": []}},
        "response_format",
        "needs response_format.triggers",
    ),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex"),
    ({"structured_outputs": []}, "structured_outputs", "structured_outputs must be an object"),
    ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "structured_outputs", "got regex, choice"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "a list of at least one string"),
    (
        {"structured_outputs": {"choice": "a"}},
        "structured_outputs",
        "structured_outputs.choice must be a list",
    ),
    (
        {"structured_outputs": {"json": 3}},
        "structured_outputs",
        "structured_outputs.json must be a JSON schema",
    ),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs", "structured_outputs.regex must be a string"),
    ({"structured_outputs": {"structural_tag": 3}}, "structured_outputs", "structural_tag must be an object"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "cannot both constrain the answer",
    ),
    ({"use_beam_search": True}, "use_beam_search", "use_beam_search is not supported"),
    ({"length_penalty": 2}, "length_penalty", "length_penalty is not supported"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids", "logprob_token_ids is not supported"),
    ({"functions": []}, "functions", "functions is not supported: it is the old form of `tools`"),
    ({"function_call": "auto"}, "function_call", "it is the old form of `tool_choice`"),
    ({"modalities": ["text", "audio"]}, "modalities", "modalities is not supported"),
    ({"audio": {"voice": "alloy"}}, "audio", "audio is not supported"),
    ({"web_search_options": {}}, "web_search_options", "web_search_options is not supported"),
    ({"mm_processor_kwargs": {}}, "mm_processor_kwargs", "mm_processor_kwargs is not supported"),
    ({"media_io_kwargs": {}}, "media_io_kwargs", "media_io_kwargs is not supported"),
    ({"kv_transfer_params": {}}, "kv_transfer_params", "kv_transfer_params is not supported"),
    ({"thinking_token_budget": 5}, "thinking_token_budget", "max_tokens bounds the whole answer"),
    ({"truncation_side": "right"}, "truncation_side", "it is the beginning of a prompt"),
]

COMPLETION = [
    ({"prompt": None}, "prompt", "prompt is required"),
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": []}, "prompt", "must not be empty"),
    ({"prompt": ["a", ""]}, "prompt", "prompt[1] must not be empty."),
    ({"prompt": [[1], []]}, "prompt", "prompt[1] must not be empty."),
    ({"prompt": ["a", 1]}, "prompt", "prompt must be a string, a list of strings"),
    ({"prompt": [True]}, "prompt", "prompt must be a string, a list of strings"),
    ({"prompt": [1.5]}, "prompt", "prompt must be a string, a list of strings"),
    ({"prompt": {"text": "a"}}, "prompt", "prompt must be a string, a list of strings"),
    ({"prompt": [1, 99999999]}, "prompt", "outside the vocabulary of 262: [99999999]"),
    ({"prompt": [-1]}, "prompt", "outside the vocabulary of 262: [-1]"),
    ({"prompt": [65] * 512}, "prompt", "prompt has 512 tokens"),
    ({"prompt": "x" * 700}, "prompt", "512 tokens, prompt and answer together. However, your prompt has 700"),
    ({"prompt": ["a"] * 17, "n": 128}, "prompt", "at most 2048 answers"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "max_tokens must be at least 1, got -1."),
    ({"logprobs": 21}, "logprobs", "logprobs must be at most 20, got 21."),
    ({"logprobs": -1}, "logprobs", "logprobs must be at least 0, got -1."),
    (
        {"prompt_logprobs": 1, "stream": True},
        "prompt_logprobs",
        "prompt_logprobs is not available in a stream",
    ),
    ({"suffix": "end"}, "suffix", "suffix is not supported"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "prompt_embeds is not supported"),
    ({"use_beam_search": True}, "use_beam_search", "use_beam_search is not supported"),
    ({"best_of": 3, "n": 2}, "best_of", "answers are not ranked"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs response_format.json_schema"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one of json, regex"),
]


@pytest.mark.parametrize(("fields", "param", "message"), CHAT, ids=lambda value: str(value)[:40])
async def test_chat(fields: dict[str, Any], param: str, message: str):
    with serving() as served:
        answer = await served.chat(**fields)
        assert answer.status == 400
        assert answer.error["type"] == "BadRequestError"
        assert answer.error["param"] == param
        assert message in answer.error["message"]
        assert served.engine.submitted == []
        assert (await served.chat()).json["choices"][0]["message"]["content"] == PARIS


@pytest.mark.parametrize(("fields", "param", "message"), COMPLETION, ids=lambda value: str(value)[:40])
async def test_completion(fields: dict[str, Any], param: str, message: str):
    with serving() as served:
        answer = await served.complete(**fields)
        assert answer.status == 400
        assert answer.error["type"] == "BadRequestError"
        assert answer.error["param"] == param
        assert message in answer.error["message"]
        assert served.engine.num_unfinished == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be a JSON object, got nothing"),
        (b"{", "not valid JSON"),
        (b'{"messages": ]}', "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 901, "nested too deeply"),
        (b"[1, 2]", "must be a JSON object, got a list of 2"),
        (b'"hello"', "must be a JSON object, got 'hello'"),
        (b"null", "must be a JSON object, got None"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_body_that_is_no_object(path: str, data: bytes, message: str):
    with serving() as served:
        answer = await served.request("POST", path, data=data, headers=JSON)
        assert answer.status == 400
        assert answer.error["param"] == "body"
        assert message in answer.error["message"]


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_wrong_content_type(content_type: str | None):
    headers = {"Content-Type": content_type} if content_type else {}
    with serving() as served:
        answer = await served.request("POST", "/v1/completions", data=b'{"prompt": "a"}', headers=headers)
        assert answer.status == 400
        assert answer.error["param"] == "Content-Type"
        assert "application/json" in answer.error["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/vnd.api+json"])
async def test_content_types_of_json(content_type: str):
    with serving() as served:
        answer = await served.request(
            "POST", "/v1/completions", data=b'{"prompt": "a"}', headers={"Content-Type": content_type}
        )
        assert answer.status == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "x-unknown", "gzip, identity"])
async def test_compressed_bodies(encoding: str):
    with serving() as served:
        answer = await served.request(
            "POST",
            "/v1/completions",
            data=b"\x1f\x8b\x08",
            headers={**JSON, "Content-Encoding": encoding},
        )
        assert answer.status == 415
        assert answer.error["param"] == "Content-Encoding"
        assert "uncompressed" in answer.error["message"]
        plain = await served.request(
            "POST",
            "/v1/completions",
            data=b'{"prompt": "a"}',
            headers={**JSON, "Content-Encoding": "identity"},
        )
        assert plain.status == 200


async def test_names_that_fill_headers_and_messages_are_cut():
    with serving() as served:
        unknown = {f"{i}" * 5000: 1 for i in range(100)}
        answer = await served.chat(**unknown, mirostat=10**9)
        assert answer.status == 200
        assert len(answer.headers["x-ignored-params"]) < 4096
        assert "mirostat" in (await served.chat(mirostat=10**9)).headers["x-ignored-params"]
        missing = await served.chat(model="m" * 100_000)
        assert missing.status == 404
        assert len(missing.data) < 1000


async def test_a_name_given_twice():
    with serving() as served:
        data = b'{"prompt": "a", "temperature": 0, "temperature": 1}'
        answer = await served.request("POST", "/v1/completions", data=data, headers=JSON)
        assert answer.status == 400
        assert answer.error["param"] == "temperature"


async def test_null_characters_are_characters():
    with serving(echo) as served:
        answer = await served.complete(prompt="a\0b", user="\0", cache_salt="\0", max_tokens=3)
        assert answer.json["choices"][0]["text"] == "a\0b"
        assert (await served.chat(model="\0")).status == 404


async def test_unknown_model():
    with serving(served_model_names=("small", "alias")) as served:
        for answer in (await served.chat(model="big"), await served.complete(model="big")):
            assert answer.status == 404
            assert answer.error["type"] == "NotFoundError"
            assert answer.error["param"] == "model"
            assert answer.error["code"] == "model_not_found"
            assert answer.error["message"] == "The model `big` does not exist. Served here: `small`, `alias`."
        for name in ("small", "alias"):
            assert (await served.chat(model=name)).json["model"] == name
        for name in ("", None):
            assert (await served.chat(model=name)).json["model"] == "small"


async def test_context_error_has_a_code():
    with serving() as served:
        answer = await served.complete(prompt="x" * 700)
        assert answer.error["code"] == "context_length_exceeded"


async def test_what_is_far_too_long_is_refused_without_being_tokenized(monkeypatch: pytest.MonkeyPatch):
    digits = "1" * 1_000_000
    chat = {"messages": [{"role": "user", "content": digits}]}
    tokenized: list[int] = []

    with serving() as served:
        encode = served.llm.tokenizer.encode_batch

        def encode_batch(texts: list[str], *arguments: Any, **options: Any) -> Any:
            tokenized.append(sum(map(len, texts)))
            return encode(texts, *arguments, **options)

        monkeypatch.setattr(served.llm.tokenizer, "encode_batch", encode_batch)
        answers = [
            await served.complete(prompt=digits),
            await served.complete(prompt=["fits", digits]),
            await served.complete(prompt=["1" * 600] * 2000),  # each is no trouble, all together are
            await served.chat(**chat),
            await served.post("/v1/chat/completions/render", chat),
            await served.post("/v1/completions/render", {"prompt": digits}),
        ]
        assert {answer.status for answer in answers} == {400}
        assert {answer.error["code"] for answer in answers} == {"context_length_exceeded"}
        assert [answer.error["param"] for answer in answers] == [*["prompt"] * 3, *["messages"] * 2, "prompt"]
        assert "your prompt has at least 512 tokens. Please" in answers[0].error["message"]
        assert "reduce messages to at most 511 tokens" in answers[3].error["message"]
        assert sum(tokenized) < 500_000
        cut = await served.complete(prompt=digits, truncate_prompt_tokens=9, max_tokens=1)
        assert cut.json["usage"]["prompt_tokens"] == 9
        assert (await served.chat(**chat, truncate_prompt_tokens=9, max_tokens=1)).status == 200
        assert (await served.post("/tokenize", {"prompt": digits})).json["count"] == len(digits)


async def test_large_bodies_are_read_on_another_thread(monkeypatch: pytest.MonkeyPatch):
    threads: list[threading.Thread] = []

    def recorded(data: bytes) -> Any:
        threads.append(threading.current_thread())
        return json_object(data)

    monkeypatch.setattr("jaxserve.server.intake.json_object", recorded)
    with serving(info={"max_model_len": 200_000}) as served:
        for text in ("x", "x" * 100_000):
            assert (await served.complete(prompt=text)).json["usage"]["prompt_tokens"] == len(text)
        twice = b'{"prompt": "%s", "n": 1, "n": 2}' % (b"x" * 100_000)
        answer = await served.request("POST", "/v1/completions", data=twice, headers=JSON)
        assert (answer.status, answer.error["param"]) == (400, "n")
        back = await served.post("/detokenize", {"tokens": [97] * 50_000})
        assert back.json["prompt"] == "a" * 50_000
        shown = await served.post("/tokenize", {"prompt": "a" * 70_000, "return_token_strs": True})
        assert shown.json["token_strs"] == ["a"] * 70_000
        rendered = await served.post("/v1/completions/render", {"prompt": [[97] * 50_000, [98]]})
        assert [one["prompt"] for one in rendered.json] == ["a" * 50_000, "b"]
        wrong = await served.post("/detokenize", {"tokens": [97] * 50_000 + [999]})
        assert (wrong.status, wrong.error["param"]) == (400, "tokens")
    main = threading.main_thread()
    assert [thread is main for thread in threads] == [True, *[False] * 6]


async def test_a_text_of_any_length_is_not_one_of_every_length(monkeypatch: pytest.MonkeyPatch):
    with serving() as served:
        monkeypatch.setattr("jaxserve.async_llm.MAX_TEXT", 10_000)
        text = "1" * 10_001
        messages = [{"role": "user", "content": text}]
        for path, body, param in (
            ("/tokenize", {"prompt": text}, "prompt"),
            ("/tokenize", {"messages": messages}, "messages"),
            ("/v1/completions", {"prompt": text, "truncate_prompt_tokens": 5}, "prompt"),
            ("/v1/chat/completions", {"messages": messages, "truncate_prompt_tokens": 5}, "messages"),
        ):
            refused = (await served.post(path, body)).error
            assert refused["param"] == param
            assert "at most 10000 are tokenized here" in refused["message"]
        assert (await served.post("/tokenize", {"prompt": text[:-1]})).json["count"] == 10_000


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/v1/embeddings", ": this server generates text, and makes no embeddings, scores or classes."),
        ("/v1/audio/speech", ": this server generates text, and neither hears nor speaks."),
        ("/v1/responses", ": use /v1/chat/completions."),
        ("/chat/completions", "; did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "; did you mean /v1/chat/completions?"),
        ("/v1/tokenize", "; did you mean /tokenize?"),
        ("/v1/embeddingss", "."),
        ("/" + "a" * 5000, "."),
    ],
)
async def test_a_path_that_others_serve_is_explained(path: str, end: str):
    with serving() as served:
        missing = await served.request("POST", path, data=b"{}")
        assert missing.status == 404
        assert missing.error["message"] == f"There is no {path!r:.200} on this server{end}"


async def test_wrong_path_and_method():
    with serving() as served:
        missing = await served.request("GET", "/v1/nothing-here")
        assert missing.status == 404
        assert missing.error["type"] == "NotFoundError"
        assert "/v1/nothing-here" in missing.error["message"]
        for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "TRACE"):
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
                assert (await served.request(method, path)).status == 405
        options = await served.request("OPTIONS", "/v1/completions")
        assert (options.status, options.data) == (200, b"")
        assert set(options.headers["allow"].split(", ")) == {"POST", "OPTIONS"}
        assert (await served.request("OPTIONS", "/v1/nothing-here")).error["type"] == "NotFoundError"
        wrong = await served.request("PUT", "/v1/completions", data=b"{}")
        assert wrong.status == 405
        assert wrong.headers["allow"] == "POST"
        assert wrong.error["message"] == "PUT is not allowed for '/v1/completions': use POST."


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/moderations"])
async def test_routes_of_other_servers(path: str):
    with serving() as served:
        answer = await served.post(path, {"model": "scripted", "input": "x"})
        assert answer.status == 404
        assert answer.error["type"] == "NotFoundError"


async def test_body_above_the_limit():
    with serving(max_body_bytes=4096) as served:
        answer = await served.chat(messages=[{"role": "user", "content": "x" * 5000}])
        assert answer.status == 413
        assert answer.error["type"] == "RequestTooLargeError"
        assert answer.error["param"] == "body"
        assert "4096 bytes" in answer.error["message"]


async def test_unexpected_errors_tell_the_client_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def broken(*arguments: Any, **options: Any) -> Any:
        raise KeyError("a secret of the implementation")

    with serving() as served:
        monkeypatch.setattr(served.llm, "generate", broken)
        answer = await served.post(
            "/v1/chat/completions", {"messages": QUESTION}, **{"X-Request-Id": "the-request"}
        )
        assert answer.status == 500
        assert answer.error["type"] == "InternalServerError"
        assert "secret" not in json.dumps(answer.json)
        assert "Traceback" not in json.dumps(answer.json)
        assert "the-request" in answer.error["message"]
    assert "the-request" in caplog.text
    assert "a secret of the implementation" in caplog.text


def test_overload_and_death_ask_to_come_back():
    for error, status in ((QueueFullError("full"), 429), (EngineDeadError("gone"), 503)):
        answer = to_api_error(error)
        assert answer.status == status
        assert int(answer.headers["Retry-After"]) >= 1


async def test_a_full_queue_is_429():
    with serving(engine={"stalled": True}, info={"max_num_seqs": 1}, max_num_queued_reqs=1) as served:
        answer = await served.complete(prompt=["a", "b", "c"])
        assert answer.status == 429
        assert answer.error["type"] == "RateLimitError"
        assert answer.headers["retry-after"] == "1"
        served.engine.wait_until(lambda: served.engine.num_unfinished == 0)  # the first two were taken back
        served.engine.resume()
        assert (await served.complete()).status == 200
