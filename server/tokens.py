"""POST /tokenize and /detokenize: what the model sees."""

from __future__ import annotations

from quart import Request, Response

from jaxserve.async_llm import LONG_TEXT
from jaxserve.errors import RequestError
from jaxserve.server.answers import DetokenizedText, Tokens
from jaxserve.server.conversation import render
from jaxserve.server.intake import take
from jaxserve.server.protocol import DetokenizeRequest, TokenizeRequest
from jaxserve.server.respond import made_response
from jaxserve.server.state import ServerState


async def tokenize(state: ServerState, request: Request) -> Response:
    """Token ids of a text (`prompt`) or a conversation (`messages`), as the other endpoints make them."""
    taken = await take(state, request, TokenizeRequest, {})
    fields, llm = taken.fields, state.llm
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError("Send either prompt (a string) or messages (a list).", param="prompt")
    if fields.messages is None:
        adds_special_tokens = fields.add_special_tokens is not False
        token_ids = await llm.encode(fields.prompt or "", add_special_tokens=adds_special_tokens)
    else:
        adds_special_tokens = bool(fields.add_special_tokens)  # the chat template writes them itself
        prompt = await render(
            state,
            fields.messages,
            fields,
            taken.num_bytes,
            add_special_tokens=adds_special_tokens,
            wants_tool_calls=bool(fields.tools),  # as chat does by default
            must_fit=False,
        )
        token_ids = prompt.token_ids

    def answer() -> Tokens:
        strings = llm.tokenizer.convert_ids_to_tokens(token_ids) if fields.return_token_strs else None
        return Tokens(len(token_ids), llm.info.max_model_len, token_ids, strings)

    return await made_response(answer, taken.headers, is_large=len(token_ids) > LONG_TEXT)


async def detokenize(state: ServerState, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    taken = await take(state, request, DetokenizeRequest, {})
    token_ids, vocab_size = taken.fields.tokens, state.llm.info.vocab_size

    def answer() -> DetokenizedText:
        outside = [i for i in token_ids if not 0 <= i < vocab_size]
        if outside:
            raise RequestError(
                f"tokens has token ids outside the vocabulary of {vocab_size}: {outside[:5]}.", param="tokens"
            )
        return DetokenizedText(state.llm.tokenizer.decode(token_ids, skip_special_tokens=False))

    return await made_response(answer, taken.headers, is_large=len(token_ids) > LONG_TEXT)
