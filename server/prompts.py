"""From what a request brings (text, token ids, lists of them) to token ids that fit the model's context."""

from __future__ import annotations

from typing import Any

from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import RequestError
from jaxserve.inputs import TokenizedPrompt, too_long
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.protocol import CompletionRequest

MAX_ANSWERS = 2048  # prompts x n of one request: all of them are in flight together


async def completion_prompts(
    llm: AsyncLLM, request: CompletionRequest, params: SamplingParams
) -> list[TokenizedPrompt]:
    """The prompts of a plain completion.  Raises RequestError naming `prompt`."""
    given = _listed(request.prompt)
    if len(given) * params.n > MAX_ANSWERS:
        raise RequestError(
            f"prompt has {len(given)} prompts and n is {params.n}: at most {MAX_ANSWERS} answers fit.",
            param="prompt",
        )
    texts = [one for one in given if isinstance(one, str)]
    add_special_tokens = request.add_special_tokens is not False
    truncate = request.truncate_prompt_tokens
    encoded = iter(
        await llm.encode_batch(texts, add_special_tokens=add_special_tokens, must_fit=truncate is None)
    )
    prompts = [
        TokenizedPrompt(next(encoded), one) if isinstance(one, str) else TokenizedPrompt(one) for one in given
    ]
    return [fit(llm, prompt, params, truncate, param="prompt") for prompt in prompts]


def fit(
    llm: AsyncLLM, prompt: TokenizedPrompt, params: SamplingParams, truncate: int | None, *, param: str
) -> TokenizedPrompt:
    """The prompt with its beginning cut off as truncate_prompt_tokens says (-1: whatever does not fit).

    Raises ContextLengthError for a prompt that leaves no room for an answer, RequestError for other faults.
    """
    limit, token_ids = llm.info.max_model_len, prompt.token_ids
    if truncate is not None:
        keep = limit - min(params.max_tokens or 1, limit - 1) if truncate == -1 else truncate
        if not 1 <= keep <= limit:
            raise RequestError(
                f"truncate_prompt_tokens must be -1 (what fits) or from 1 to the context of {limit} tokens, "
                f"got {truncate}.",
                param="truncate_prompt_tokens",
            )
        if len(token_ids) > keep:
            prompt = prompt.last(keep)
            token_ids = prompt.token_ids
    if not token_ids:
        raise RequestError(f"{param} must not be empty: it has no tokens.", param=param)
    if len(token_ids) >= limit:
        raise too_long(len(token_ids), limit, param=param)
    return prompt


def _listed(prompt: Any) -> list[str] | list[list[int]]:
    """A list of prompts, whichever of the four accepted shapes came."""
    if prompt is None or prompt == "" or prompt == []:
        raise RequestError("prompt is required and must not be empty.", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list):
        if all(isinstance(item, str) for item in prompt):
            if "" in prompt:
                raise RequestError(f"prompt[{prompt.index('')}] must not be empty.", param="prompt")
            return prompt
        if _are_token_ids(prompt):
            return [prompt]
        if all(isinstance(item, list) and _are_token_ids(item) for item in prompt):
            if [] in prompt:
                raise RequestError(f"prompt[{prompt.index([])}] must not be empty.", param="prompt")
            return prompt
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids, "
        f"got {prompt!r:.60}.",
        param="prompt",
    )


def _are_token_ids(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int}  # hundreds of thousands, and no turn of the interpreter for each
