"""What a caller may hand over as a prompt, and the check that turns it into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, cast

from jaxserve.engine.host_limits import num_processors
from jaxserve.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    from jaxserve.engine.protocol import EngineInfo, ImageInput
    from jaxserve.media.patches import ProcessedImage
    from jaxserve.media.pixel_budget import PixelHold
    from jaxserve.text.tokenizer import Tokenizer
    from jaxserve.text.tool_text import CallWriter


class TextPrompt(TypedDict):
    """Text still to be tokenized."""

    prompt: str
    multi_modal_data: NotRequired[Mapping[str, Any] | None]  # {"image": a PIL image or a list of them}
    mm_processor_kwargs: NotRequired[Mapping[str, Any] | None]  # min_pixels, max_pixels


class TokensPrompt(TypedDict):
    """Ready token ids; `prompt`, when there, is the text they came from and is only handed back."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str | None]
    multi_modal_data: NotRequired[Mapping[str, Any] | None]
    mm_processor_kwargs: NotRequired[Mapping[str, Any] | None]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as the engine wants it, and its text where the caller gave text.

    In the text an image has one placeholder, in token_ids as many as it has tokens.
    """

    token_ids: list[int]
    text: str | None = None
    images: tuple[ImageInput, ...] = ()
    hold: PixelHold | None = None  # of the images' pixels, while they wait for the engine

    def last(self, num_tokens: int) -> TokenizedPrompt:
        """The prompt without its beginning, with this many tokens.

        Raises RequestError (param "truncate_prompt_tokens") where that would cut an image in two.
        """
        cut = len(self.token_ids) - num_tokens
        kept = tuple(
            replace(image, offset=image.offset - cut) for image in self.images if image.offset >= cut
        )
        for image in self.images:
            if image.offset < cut < image.offset + image.num_tokens:
                raise RequestError(
                    f"truncate_prompt_tokens: the last {num_tokens} tokens would begin in the middle of an image, "
                    f"which has {image.num_tokens}.",
                    param="truncate_prompt_tokens",
                )
        return TokenizedPrompt(self.token_ids[cut:], None, kept, self.hold)


AnyPrompt = Prompt | TokenizedPrompt

_TOGETHER = 2**18  # characters of texts that are tokenized before a look at what they became
_MOST_TOGETHER = 2**20  # likewise, where they are so long that fewer would not keep every core busy


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt; the template's arguments are described at ChatTemplate.render."""

    chat_template: str | None  # jinja2 source, or the name of one of the model's own; None: its default
    chat_template_content_format: Literal["auto", "string", "openai"]  # auto: what the template reads
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None  # None: unless the final message is continued
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    wants_tool_calls: bool  # describe tools even where the template does not; default False
    write_call: CallWriter | None  # how the model writes a call, where the template does not know
    add_special_tokens: bool  # beside those that the template writes itself; default False
    must_fit: bool  # refuse a prompt that leaves no room for an answer, mostly unread; default False
    max_characters: int | None  # of the prompt, beyond which it is refused
    mm_processor_kwargs: Mapping[str, Any] | None  # bounds for the images of messages: min_pixels, max_pixels
    images: Sequence[ProcessedImage]  # those of messages, where they have been loaded before


def tokenize_prompt(prompt: AnyPrompt, tokenizer: Tokenizer, limit: int) -> TokenizedPrompt:
    """Token ids of a prompt in any accepted shape; text gets the tokenizer's own special tokens (BOS).

    Raises RequestError (param "prompt") for any other shape, ContextLengthError for a text of `limit` tokens and more.
    Safe to call from any thread.
    """
    if isinstance(prompt, TokenizedPrompt):
        return prompt
    if isinstance(prompt, str):
        (token_ids,) = encode_texts([prompt], tokenizer, limit)
        return TokenizedPrompt(token_ids, prompt)
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt, tokenizer, limit)
    return TokenizedPrompt(_as_token_ids(prompt))


def encode_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    limit: int | None,
    add_special_tokens: bool = True,
    *,
    param: str = "prompt",
) -> list[list[int]]:
    """Token ids of texts that must have less than `limit` tokens each, unless it is None.

    Raises RequestError as Tokenizer.encode does, and ContextLengthError for the first that has more, before much of
    what cannot fit is tokenized: millions of tokens take seconds, and a gigabyte.
    """
    if limit is None:
        return tokenizer.encode_batch(texts, add_special_tokens, param=param)
    encoded: list[list[int]] = []
    together: list[str] = []
    num_characters, num_cores = 0, _num_cores()
    for i, text in enumerate(texts):
        least = tokenizer.least_tokens(text, limit)
        if least >= limit:
            raise too_long(least, limit, param=param, is_exact=False)
        together.append(text)
        num_characters += len(text)
        is_enough = num_characters >= _TOGETHER and (
            len(together) >= num_cores or num_characters >= _MOST_TOGETHER
        )
        if not is_enough and i + 1 < len(texts):
            continue
        for token_ids in tokenizer.encode_batch(together, add_special_tokens, param=param):
            if len(token_ids) >= limit:
                raise too_long(len(token_ids), limit, param=param)
            encoded.append(token_ids)
        together, num_characters = [], 0
    return encoded


@cache
def _num_cores() -> int:
    return num_processors()  # which asks the system


def tokenize_texts(prompts: Sequence[AnyPrompt], tokenizer: Tokenizer, limit: int) -> list[AnyPrompt]:
    """The prompts with token ids in place of plain texts, which are tokenized on all cores.

    If one is wrong they stay as they are, for tokenize_prompt to tell which.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    try:
        encoded = iter(encode_texts(texts, tokenizer, limit))
    except RequestError:
        return list(prompts)
    return [TokenizedPrompt(next(encoded), one) if isinstance(one, str) else one for one in prompts]


def check_characters(texts: Sequence[str], most: int | None, *, param: str) -> None:
    """Raise RequestError for texts of more than `most` characters together."""
    total = sum(map(len, texts))
    if most is not None and total > most:
        raise RequestError(f"{param} has {total} characters; at most {most} are tokenized here.", param=param)


def too_long(num_tokens: int, limit: int, *, param: str, is_exact: bool = True) -> ContextLengthError:
    """The error about a prompt with that many tokens, or more than that, for a context of `limit`."""
    return ContextLengthError(
        f"This model's maximum context length is {limit} tokens, prompt and answer together. However, your prompt "
        f"has {'' if is_exact else 'at least '}{num_tokens} tokens. Please reduce {param} to at most {limit - 1} "
        "tokens.",
        param=param,
    )


def check_prompt(prompt: TokenizedPrompt, info: EngineInfo) -> None:
    """Refuse a prompt that is empty, outside the vocabulary, or leaves no room for an answer token."""
    token_ids = prompt.token_ids
    if not token_ids:
        raise RequestError("prompt must not be empty: it has no tokens.", param="prompt")
    if min(token_ids) < 0 or max(token_ids) >= info.vocab_size:
        outside = [i for i in token_ids if not 0 <= i < info.vocab_size]
        raise RequestError(
            f"prompt has token ids outside the vocabulary of {info.vocab_size}: {outside[:5]}.",
            param="prompt",
        )
    if len(token_ids) >= info.max_model_len:
        raise too_long(len(token_ids), info.max_model_len, param="prompt")


def prompt_list(prompts: AnyPrompt | Sequence[AnyPrompt]) -> list[AnyPrompt]:
    """One prompt or several, as a list of prompts; [1, 2, 3] is one, of token ids."""
    if isinstance(prompts, str | Mapping | TokenizedPrompt):
        return [cast(AnyPrompt, prompts)]
    try:
        several = list(prompts)
    except TypeError:
        raise RequestError(
            f"prompts must be one prompt or a list of them, got {type(prompts).__name__}.", param="prompt"
        ) from None
    if several and hasattr(several[0], "__index__"):
        return [cast(AnyPrompt, prompts)]
    return cast(list[AnyPrompt], several)


def _from_mapping(prompt: Mapping[str, Any], tokenizer: Tokenizer, limit: int) -> TokenizedPrompt:
    unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
    if unknown:
        raise RequestError(
            f"prompt has unknown keys {unknown}: use 'prompt' (text) or 'prompt_token_ids'.", param="prompt"
        )
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt['prompt'] must be text, got {type(text).__name__}.", param="prompt")
    token_ids = prompt.get("prompt_token_ids")
    if token_ids is not None:
        return TokenizedPrompt(_as_token_ids(token_ids), text)
    if text is None:
        raise RequestError("prompt needs 'prompt' (text) or 'prompt_token_ids'.", param="prompt")
    return tokenize_prompt(text, tokenizer, limit)


def _as_token_ids(prompt: Any) -> list[int]:
    """A plain list of ints: what msgpack carries and what `hash` of a page is computed over."""
    try:
        token_ids = list(prompt)
    except TypeError:
        raise RequestError(
            f"prompt must be text, token ids or a dict of either, got {type(prompt).__name__}.",
            param="prompt",
        ) from None
    if set(map(type, token_ids)) <= {int}:  # as a rule, and seen without a turn of the interpreter for each
        return token_ids
    wrong = [i for i in token_ids if isinstance(i, bool) or not hasattr(i, "__index__")]
    if wrong:
        raise RequestError(f"prompt token ids must be integers, got {wrong[0]!r}.", param="prompt")
    return [i.__index__() for i in token_ids]
