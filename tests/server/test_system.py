"""Health, models, tokenizing, counters."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import jaxserve
from jaxserve.errors import RequestFailedError
from jaxserve.sampling_params import SamplingParams
from tests.patience import PATIENCE
from tests.server.serving import PARIS, Serving, http_client, listening, say, serving
from tests.tiny import BOS


async def test_health_of_a_living_server():
    with serving() as served:
        for method, path in (("GET", "/health"), ("HEAD", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            answer = await served.request(method, path)
            assert answer.status == 200
            assert answer.data == b""


async def test_a_dead_engine_fails_everything_at_once():
    with serving(engine={"stalled": True}) as served:
        served.engine.die(RuntimeError("the device is lost"))
        waiting = await served.chat()  # submitted before or after the news, it must not hang
        assert waiting.status == 503
        while not served.llm.is_dead:  # noqa: ASYNC110  # the news comes from the engine's thread
            await asyncio.sleep(0)
        for answer in (
            await served.request("GET", "/health"),
            await served.request("GET", "/ping"),
            await served.chat(),
            await served.complete(stream=True),
        ):
            assert answer.status == 503
            assert answer.error["type"] == "ServiceUnavailableError"
            assert "the device is lost" in answer.error["message"]
            assert "retry-after" in answer.headers
        assert (await served.request("GET", "/metrics")).status == 200
        assert (await served.request("GET", "/version")).status == 200


async def test_version():
    with serving() as served:
        assert (await served.request("GET", "/version")).json == {"version": jaxserve.__version__}


async def test_models():
    with serving(served_model_names=("one", "org/two")) as served:
        body = (await served.request("GET", "/v1/models")).json
        assert body["object"] == "list"
        assert [card["id"] for card in body["data"]] == ["one", "org/two"]
        card = body["data"][0]
        assert (card["object"], card["owned_by"], card["root"]) == ("model", "jaxserve", "scripted")
        assert card["max_model_len"] == 512
        assert (await served.request("GET", "/v1/models/org/two")).json["id"] == "org/two"
        missing = await served.request("GET", "/v1/models/three")
        assert missing.status == 404
        assert missing.error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "aé"}, [BOS, 97, 195, 169]),
        ({"prompt": "a", "add_special_tokens": False}, [97]),
        (
            {"messages": [{"role": "u", "content": "a"}], "add_generation_prompt": False},
            [258, 117, 10, 97, 259, 10],
        ),
        ({"prompt": ""}, [BOS]),
    ],
)
async def test_tokenize_and_back(body: dict[str, Any], tokens: list[int]):
    with serving() as served:
        served.llm.tokenizer._put_bos_eos(True, False)
        answer = (await served.post("/tokenize", body)).json
        assert answer == {"count": len(tokens), "max_model_len": 512, "tokens": tokens, "token_strs": None}
        strings = (await served.post("/tokenize", {**body, "return_token_strs": True})).json["token_strs"]
        assert len(strings) == len(tokens)
        back = await served.post("/detokenize", {"tokens": tokens})
        assert (
            await served.post("/tokenize", {"prompt": back.json["prompt"], "add_special_tokens": False})
        ).json["tokens"] == tokens


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    ],
)
async def test_what_cannot_be_tokenized(path: str, body: dict[str, Any], status: int, param: str):
    with serving() as served:
        answer = await served.post(path, body)
        assert answer.status == status
        assert answer.error["param"] == param


async def test_load():
    with serving(engine={"stalled": True}, info={"max_num_seqs": 1}) as served:
        asked = [asyncio.create_task(served.complete()) for _ in range(3)]
        await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 3)
        busy = {"server_load": 3, "num_requests_running": 1, "num_requests_waiting": 2}
        assert (await served.request("GET", "/load")).json == busy
        served.engine.resume()
        await asyncio.gather(*asked)
        await asyncio.to_thread(served.engine.wait_until, lambda: served.engine.num_unfinished == 0)
        idle = {"server_load": 0, "num_requests_running": 0, "num_requests_waiting": 0}
        assert (await served.request("GET", "/load")).json == idle


async def counters(served: Serving) -> dict[tuple[str, frozenset[Any]], float]:
    answer = await served.request("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.data.decode())
        for sample in family.samples
    }


MODEL = ("model_name", "scripted")
ACCESS_LOG = "jaxserve.server.access_log"


@pytest.mark.parametrize("prefix", ["jaxserve:", "vllm:"])
async def test_metrics(prefix: str):
    with serving(metrics_prefix=prefix) as served:
        await served.chat()
        await served.chat(stream=True, max_tokens=5)
        await served.complete(prompt=["a", "b"], n=2, max_tokens=3)
        assert (await served.chat(temperature=9)).status == 400
        assert (await served.request("GET", "/no/such/path")).status == 404
        values = await counters(served)

    def value(name: str, *labels: tuple[str, str]) -> float:
        return values[prefix + name, frozenset({MODEL, *labels})]

    assert value("prompt_tokens_total") == 49 + 49 + 2
    assert value("generation_tokens_total") == len(PARIS) + 1 + 5 + 12
    assert value("request_success_total", ("finished_reason", "stop")) == 1
    assert value("request_success_total", ("finished_reason", "length")) == 5
    num_tokens, num_answers = len(PARIS) + 1 + 5 + 12, 6
    assert value("request_success_total", ("finished_reason", "abort")) == 0
    assert value("request_success_total", ("finished_reason", "error")) == 0
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_time_per_output_token_seconds",
    ):
        assert value(f"{name}_count") == num_answers, name
        assert value(f"{name}_sum") >= 0, name
    assert value("inter_token_latency_seconds_count") == num_tokens - num_answers
    whole = value("request_queue_time_seconds_sum") + value("request_inference_time_seconds_sum")
    assert whole == pytest.approx(value("e2e_request_latency_seconds_sum"))
    assert value("request_prompt_tokens_count") == value("request_params_n_count") == 4
    assert value("request_params_n_sum") == 1 + 1 + 2 + 2
    assert value("request_generation_tokens_sum") == num_tokens
    assert value("request_max_num_generation_tokens_count") == 4
    assert value("request_max_num_generation_tokens_sum") == len(PARIS) + 1 + 5 + 3 + 3
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert value(name) == 0
    for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens_cached"):
        assert value(f"{name}_total") == 0
    assert value("cache_config_info", ("block_size", "16"), ("num_gpu_blocks", "128")) == 1
    compiles = {labels: v for (name, labels), v in values.items() if "compiles_after_ready_total" in name}
    assert compiles == {frozenset({MODEL}): 0}
    assert values["jaxserve_compiles_after_ready_total", frozenset({MODEL})] == 0
    route = frozenset({("handler", "/v1/chat/completions"), ("method", "POST"), ("status", "400")})
    assert values["http_requests_total", route] == 1
    assert (
        values["http_requests_total", frozenset({("handler", "none"), ("method", "GET"), ("status", "404")})]
        == 1
    )
    assert all("no/such" not in str(labels) for _, labels in values)


@pytest.mark.parametrize("stream", [False, True])
async def test_every_token_is_timed_by_the_engine(stream: bool):
    """However late and in whatever pieces the server reads them."""
    with serving(engine={"stalled": True}) as served:
        asking = asyncio.create_task(served.complete(stream=stream, max_tokens=4))
        await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
        await asyncio.to_thread(served.engine.step, 1)
        while not (await counters(served))["jaxserve:generation_tokens_total", frozenset({MODEL})]:
            pass  # the first token is on its way through the loop
        first = await counters(served)
        assert first["jaxserve:time_to_first_token_seconds_count", frozenset({MODEL})] == 1
        assert first["jaxserve:e2e_request_latency_seconds_count", frozenset({MODEL})] == 0
        served.engine.step(3)  # without awaiting: the loop gets all three at once
        await asking
        values = await counters(served)
        assert values["jaxserve:time_to_first_token_seconds_count", frozenset({MODEL})] == 1
        assert values["jaxserve:inter_token_latency_seconds_count", frozenset({MODEL})] == 3
        assert values["jaxserve:e2e_request_latency_seconds_count", frozenset({MODEL})] == 1


async def test_answers_that_do_not_end_well_are_counted():
    with serving(engine={"stalled": True}) as served:
        streams = [served.llm.generate("hi", SamplingParams(n=n), str(n)) for n in (1, 2)]
        streams[0].close()
        served.engine.fail(served.engine.submitted[1].request_id, "out of luck")
        served.engine.step(1)
        with pytest.raises(RequestFailedError):
            await anext(streams[1])
        values = await counters(served)
        for reason, count in (("abort", 1), ("error", 2), ("stop", 0)):
            labels = frozenset({MODEL, ("finished_reason", reason)})
            assert values["jaxserve:request_success_total", labels] == count
        assert values["jaxserve:e2e_request_latency_seconds_count", frozenset({MODEL})] == 0


async def test_log_line(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "jaxserve")
    with serving() as served:
        await served.chat(request_id="logged-one", user="me\n", metadata={"a": "b"})
        assert "POST '/v1/chat/completions' 200" in caplog.text
        assert "logged-one user='me\\n' metadata={'a': 'b'}" in caplog.text
        await served.complete(guided_json={}, top_a=1, user="you")
        assert "ignored='guided_json, top_a' user='you'" in caplog.text
    caplog.clear()
    with serving(log_requests=False) as served:
        await served.chat()
        assert "POST" not in caplog.text
    with serving(unlogged_paths=("/health", "/metrics")) as served:
        for path in ("/health", "/version", "/metrics"):
            await served.request("GET", path)
        assert [record.getMessage().split()[1] for record in caplog.records] == ["'/version'"]


@pytest.mark.parametrize("stays", [True, False])
async def test_a_stream_is_logged_at_its_end(caplog: pytest.LogCaptureFixture, stays: bool):
    caplog.set_level("INFO", ACCESS_LOG)
    with serving(say("abc"), engine={"stalled": True}) as served:
        async with listening(served) as url, http_client(url) as client:
            request = client.build_request("POST", "/v1/completions", json={"prompt": "x", "stream": True})
            sending = asyncio.create_task(client.send(request, stream=True))
            await asyncio.to_thread(served.engine.wait_until, lambda: len(served.engine.submitted) == 1)
            await asyncio.to_thread(served.engine.step)
            response = await sending
            assert told(caplog) == []
            if stays:
                served.engine.resume()
                await response.aread()
            await response.aclose()
            async with asyncio.timeout(PATIENCE):
                while not told(caplog):  # noqa: ASYNC110  # a record sets no event
                    await asyncio.sleep(0)
    note = "" if stays else r" \(the client hung up\)"
    (line,) = told(caplog)
    assert re.fullmatch(rf"POST '/v1/completions' 200 [0-9.]+ ms{note} [0-9a-z-]+", line)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == ACCESS_LOG]
