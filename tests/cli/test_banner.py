"""What `jaxserve serve` prints when it answers."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from jaxserve.cli.banner import banner
from jaxserve.engine.protocol import EngineInfo
from jaxserve.server.settings import ServerSettings
from tests.vision import vision_info

INFO = EngineInfo(
    model="org/it's a model",
    vocab_size=100,
    max_model_len=2048,
    max_num_seqs=4,
    max_num_batched_tokens=256,
    page_size=16,
    num_pages=100,
    max_logprobs=5,
    dtype="float32",
    device="cpu",
)


def curl_of(text: str) -> list[str]:
    start = text.index("  curl")
    return shlex.split(text[start : text.index("\n\n", start)])


def test_the_commands_can_be_pasted() -> None:
    text = banner("http://127.0.0.1:8000", ServerSettings(), INFO)
    curl = curl_of(text)
    assert curl[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert json.loads(curl[-1])["model"] == "org/it's a model"
    python = text[text.index("  from openai") : text.index("\nor in a terminal")]
    compile("\n".join(line.strip() for line in python.splitlines()), "snippet", "exec")
    assert "KV room for 1600 tokens" in text
    assert "jaxserve chat --url http://127.0.0.1:8000\n" in text


@pytest.mark.parametrize("url", ["http://0.0.0.0:80/llm", "http://[::]:80/llm"])
def test_all_addresses_become_one_that_clients_reach(url: str) -> None:
    text = banner(url, ServerSettings(), INFO)
    assert curl_of(text)[1] == "http://127.0.0.1:80/llm/v1/chat/completions"
    assert f"at {url}\n" in text


def test_keys_and_names() -> None:
    settings = ServerSettings(api_keys=("secret",), served_model_names=("short", "long"))
    text = banner("http://127.0.0.1:8000", settings, INFO)
    assert "Authorization: Bearer YOUR_API_KEY" in curl_of(text)
    assert "jaxserve chat --url http://127.0.0.1:8000 --api-key YOUR_API_KEY\n" in text
    assert "secret" not in text
    assert "serves short (also long) at http" in text
    assert json.loads(curl_of(text)[-1])["model"] == "short"


def test_unix_sockets() -> None:
    curl = curl_of(banner("http+unix:///tmp/x.sock", ServerSettings(uds="/tmp/x.sock"), INFO) + "\n")
    assert curl[1:4] == ["--unix-socket", "/tmp/x.sock", "http://localhost/v1/chat/completions"]


def test_models_that_see() -> None:
    assert "images" not in banner("http://127.0.0.1:8000", ServerSettings(), INFO)
    images = vision_info()["images"]
    text = banner("http://127.0.0.1:8000", ServerSettings(), replace(INFO, images=images))
    assert "takes images, which become up to 64 tokens each\n" in text
