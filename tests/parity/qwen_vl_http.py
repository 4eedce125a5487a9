"""The same comparison through the HTTP server: photographs in, tokens and log-probabilities out."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from openai import OpenAI
from PIL import Image
from safetensors.numpy import save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from jaxserve.bench.server_process import ServerProcess
from jaxserve.text.tokenizer_files import tokenizer_files
from jaxserve.text.tokenizer_parts import TokenizerParts
from tests.media.photos import CAT, ROCKET
from tests.models.vision_cases import CONFIGS, IMAGE, NUM_GENERATED, PROCESSOR, checkpoint
from tests.parity.qwen_vl_reference import Reference
from tests.tiny import byte_tokenizer
from tests.vision import TEMPLATE, TOKENS, part, text, user

TOLERANCE = 2e-3  # of log-probabilities
FLAGS = ("--max-model-len=512", "--max-num-seqs=4", "--max-num-batched-tokens=64", "--forbid-recompile")


def compare_over_http(name: str, reference: Reference) -> bool:
    """Whether all conversations are answered with transformers' own tokens."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(name, Path(folder))
        with ServerProcess(str(model), FLAGS) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
            cases = _conversations().items()
            return min([_compare(name, client, reference, title, case) for title, case in cases])


def write_model(name: str, folder: Path) -> Path:
    """A model directory as users have it."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    settings = {"image_processor_type": "Qwen2VLImageProcessor"} | asdict(PROCESSOR)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    save_file(checkpoint(name).weights, folder / "model.safetensors")
    backend = byte_tokenizer(special=TOKENS).backend
    parts = TokenizerParts(backend, eos_token="<|eos|>", chat_templates={"default": TEMPLATE})
    for file, content in tokenizer_files(parts).items():
        (folder / file).write_bytes(content)
    return folder


def _conversations() -> dict[str, tuple[list[Any], list[Image.Image]]]:
    """Messages, and the images in them in order."""
    cat, rocket = Image.open(CAT).convert("RGB"), Image.open(ROCKET).convert("RGB")
    small, wide, tall = cat.resize((24, 16)), rocket.resize((90, 30)), cat.resize((20, 61))
    first = [user(text("A "), part(small), text(" or "), part(wide), text("?"))]
    answered = {"role": "assistant", "content": "The cat."}
    return {
        "text": ([user(text("Hello"))], []),
        "one": ([user(part(tall), text("What?"))], [tall]),
        "large": ([user(part(cat), text("Who?"))], [cat]),
        "two": (first, [small, wide]),
        "two, and on": ([*first, answered, user(part(tall), text("and now?"))], [small, wide, tall]),
        "the same twice": ([user(part(small), part(small), text("Same?"))], [small, small]),
    }


def _compare(
    name: str,
    client: OpenAI,
    reference: Reference,
    title: str,
    conversation: tuple[list[Any], list[Image.Image]],
) -> bool:
    messages, images = conversation
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=messages,
        temperature=0,
        max_tokens=NUM_GENERATED,
        logprobs=True,
        logit_bias={
            str(IMAGE): -100
        },  # transformers would look for an image to a token that it has generated
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    choice = answer.choices[0]
    prompt, got = answer.model_extra["prompt_token_ids"], choice.model_extra["token_ids"]  # type: ignore[index]  # vLLM's fields
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    got_logprobs = [token.logprob for token in choice.logprobs.content]
    pixel_values, grids = None, []
    if images:
        seen = _processor()(images=images, return_tensors="np")
        pixel_values, grids = seen["pixel_values"], [tuple(map(int, grid)) for grid in seen["image_grid_thw"]]
    assert prompt.count(IMAGE) == sum(rows * columns // 4 for _, rows, columns in grids)
    token_ids, is_image = list(prompt), [token == IMAGE for token in prompt]
    wanted_logprobs = []
    for _ in range(NUM_GENERATED):
        logits = reference.logits(token_ids, is_image, pixel_values, grids)[-1].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum())
        token_ids.append(int(np.delete(logits, IMAGE).argmax()))
        token_ids[-1] += token_ids[-1] >= IMAGE
        wanted_logprobs.append(float(log_probs[token_ids[-1]]))
    wanted = token_ids[len(prompt) :]
    difference = float(np.abs(np.array(got_logprobs) - wanted_logprobs).max())
    holds = got == wanted and difference <= TOLERANCE
    print(
        f"{name} over HTTP, {title}: {len(prompt)} tokens, {len(images)} images: max |Δ log-prob| {difference:.1e}, "
        f"{'same' if got == wanted else 'OTHER'} tokens: {'ok' if holds else 'FAILED'}",
        flush=True,
    )
    return holds


def _processor() -> Qwen2VLImageProcessorPil:
    """transformers' own, with the settings that the server reads."""
    return Qwen2VLImageProcessorPil(
        patch_size=PROCESSOR.patch_size,
        temporal_patch_size=PROCESSOR.temporal_patch_size,
        merge_size=PROCESSOR.merge_size,
        size={"shortest_edge": PROCESSOR.min_pixels, "longest_edge": PROCESSOR.max_pixels},
        rescale_factor=PROCESSOR.rescale_factor,
        image_mean=list(PROCESSOR.image_mean),
        image_std=list(PROCESSOR.image_std),
    )
