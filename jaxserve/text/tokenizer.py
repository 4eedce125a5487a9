"""Text to token ids and back: one thin face over the `tokenizers` library."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import processors

from jaxserve.errors import CheckpointError, RequestError
from jaxserve.text.gguf_tokenizer import parts_from_gguf
from jaxserve.text.hf_tokenizer import parts_from_directory
from jaxserve.text.least_tokens import LeastTokens
from jaxserve.text.spelling import spelling_of
from jaxserve.text.token_bytes import piece_decoder
from jaxserve.text.tokenizer_parts import TokenizerParts

if TYPE_CHECKING:
    from jaxserve.text.chat_template import ChatTemplate

_SHORT = 1024  # characters that are tokenized sooner than another thread is woken
_USUAL = 8  # characters of a token; most texts have about four
_CHEAP = 65_536  # characters that are tokenized in some hundredths of a second, whatever they are

_OF_ARRAYS = frozenset(
    ("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs")
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or of a .gguf file.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it is of an unsupported kind.
    """
    path = Path(path)
    if path.is_dir():
        return Tokenizer(parts_from_directory(path))
    if path.suffix == ".gguf" and path.is_file():
        from jaxserve.loading.gguf_file import read_gguf_header  # brings numpy, which text has no use for

        return tokenizer_from_gguf(read_gguf_header(path).fields)
    raise CheckpointError(
        f"tokenizer {str(path)!r}: not there; give a Hugging Face directory or a .gguf file"
    )


def tokenizer_from_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.  Raises CheckpointError as load_tokenizer does."""
    return Tokenizer(parts_from_gguf(fields))


class Tokenizer:
    """A tokenizer ready to use.  Safe to share between threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self.backend = parts.backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos_token = parts.bos_token
        self.eos_token = parts.eos_token
        self.pad_token = parts.pad_token
        self.unk_token = parts.unk_token
        self.bos_token_id = self._known_id("bos_token", parts.bos_token)
        self.eos_token_id = self._known_id("eos_token", parts.eos_token)
        self.pad_token_id = self._known_id("pad_token", parts.pad_token)
        self.unk_token_id = self._known_id("unk_token", parts.unk_token)
        self.chat_templates = dict(parts.chat_templates)
        self._put_bos_eos(parts.add_bos, parts.add_eos)

        added = self.backend.get_added_tokens_decoder()
        self.added_ids: frozenset[int] = frozenset(added)
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._vocab = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(self._vocab.values(), default=-1) + 1  # one above the highest id
        self._pieces = piece_decoder(self.backend)
        self._bytes_of: dict[int, bytes] = {}
        self._spelling = spelling_of(self.backend, self._pieces)
        # Compiling a template costs milliseconds, and scripts render thousands of conversations.
        self._compiled = functools.lru_cache(maxsize=8)(functools.partial(_compile, self.special_tokens))
        self._least: LeastTokens | None = None
        self._making_least = threading.Lock()

    @property
    def chat_template(self) -> str | None:
        """The default chat template's source, if the checkpoint has one."""
        return self.chat_templates.get("default")

    def template_source(self, given: str | None, *, has_tools: bool) -> str | None:
        """The chat template that `given` means: jinja2 source, or the name of one of the checkpoint's.

        Without one it is the checkpoint's default, or, as in transformers, the one called tool_use where there is that
        and there are tools; None where there is none.

        Raises:
            RequestError: an unknown name (param "chat_template").
        """
        own = self.chat_templates
        if given is None:
            return own.get("tool_use", own.get("default")) if has_tools else own.get("default")
        if given not in own and "{" not in given:
            names = ", ".join(sorted(own)) or "none"
            raise RequestError(
                f"chat_template {given!r:.60} is neither jinja2 nor the name of a template of the model (it has: "
                f"{names}).",
                param="chat_template",
            )
        return own.get(given, given)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **template_kwargs: Any,
    ) -> str | list[int]:
        """The prompt of one conversation, for scripts that call transformers' tokenizer so: text, or its token ids.

        LLM.chat does more, such as images and tools that the template does not show.

        Raises:
            RequestError: as ChatTemplate.render does; for a model without a template; and for an option of
                transformers' that is about arrays.
        """
        for name in _OF_ARRAYS & template_kwargs.keys():
            if template_kwargs.pop(name) not in (None, False):
                raise RequestError(
                    f"{name} is not supported: what comes is text or a list of token ids.", param=name
                )
        source = self.template_source(chat_template, has_tools=bool(tools))
        if source is None:
            raise RequestError(
                "chat_template is missing: the model has none, so give one.", param="chat_template"
            )
        text = self._compiled(source).render(
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(text, add_special_tokens=False, param="conversation") if tokenize else text

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens, as chat templates see them: {"bos_token": "<s>", …}."""
        named = {name: getattr(self, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {name: token for name, token in named.items() if token is not None}

    def encode(self, text: str, add_special_tokens: bool = True, *, param: str = "prompt") -> list[int]:
        """Token ids of `text`.  Special tokens written in the text are recognised, as chat templates need.

        Raises:
            RequestError: the text holds lone surrogates; `param` names its field.
        """
        return self.encode_batch([text], add_special_tokens, param=param)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, *, param: str = "prompt"
    ) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them; other Python threads run while long ones are tokenized.

        Raises:
            RequestError: a text holds lone surrogates; `param` names its field.
        """
        try:
            if sum(map(len, texts)) <= _SHORT:
                return [
                    self.backend.encode(text, add_special_tokens=add_special_tokens).ids for text in texts
                ]
            # The library's `encode` keeps the interpreter's lock: a megabyte would stop the engine for seconds.
            encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encoded]
        except TypeError as error:
            if not all(isinstance(text, str) for text in texts):
                raise
            raise RequestError(
                f"{param} is not valid Unicode: it has lone surrogates (\\ud800 to \\udfff).", param=param
            ) from error

    def least_tokens(self, text: str, enough: int) -> int:
        """A number of tokens that `text` has at least, without tokenizing it; counted no further than `enough`.

        Takes about as long for a text of any length.  Nothing is counted (it is 0) of one that is short, or no longer
        than texts of `enough` tokens usually are, nor for tokenizers that may lose parts of a text (see spelling_of).
        """
        if len(text) <= max(_CHEAP, _USUAL * enough) or self._spelling is None:
            return 0
        with self._making_least:  # on demand: it has some 25 MiB, and few servers are ever sent such a text
            if self._least is None:
                self._least = LeastTokens(self._spelling.tokens())
        return self._least.count(self._spelling.segments(text), enough)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`.

        Invalid UTF-8 becomes U+FFFD.  Ids without a token (padding of the model's vocabulary) give nothing.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join([self.token_bytes(i) for i in ids if i not in skipped])
        return data[self.num_leading_spaces(data) :].decode("utf-8", errors="replace")

    def num_leading_spaces(self, data: bytes) -> int:
        """How many bytes at the start of a text are the tokenizer's own spaces and no part of the text."""
        limit = self._pieces.strip_start
        return min(limit, len(data) - len(data.lstrip(b" "))) if limit else 0

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in the middle of a text; empty for ids without a token."""
        found = self._bytes_of.get(token_id)
        if found is None:
            piece = self.id_to_token(token_id)
            if piece is None:
                found = b""
            elif token_id in self.added_ids:
                found = self._pieces.added_to_bytes(piece)
            else:
                found = self._pieces.to_bytes(piece)
            self._bytes_of[token_id] = found
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, e.g. "Ġcapital"; None for ids without a token."""
        return self.backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own writing."""
        return self._vocab.get(token)

    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str]:
        """The tokens as the vocabulary writes them; "" for ids without a token."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return [self.id_to_token(i) or "" for i in ids if i not in skipped]

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included.  A copy."""
        return dict(self._vocab)

    def _known_id(self, name: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"tokenizer: {name} {token!r} is not in the vocabulary")
        return token_id

    def _put_bos_eos(self, add_bos: bool | None, add_eos: bool | None) -> None:
        """Make the backend's post-processor put BOS and EOS as told; leave it alone when told nothing."""
        if add_bos is None and add_eos is None:
            return
        special_tokens = []
        for name, wanted in (("bos_token", add_bos), ("eos_token", add_eos)):
            if wanted and self.special_tokens.get(name) is None:
                raise CheckpointError(f"tokenizer: add_{name} is set but there is no {name}")
        if add_bos:
            special_tokens.append((self.bos_token, self.bos_token_id))
        if add_eos:
            special_tokens.append((self.eos_token, self.eos_token_id))
        single = [*([self.bos_token] if add_bos else ()), "$A", *([self.eos_token] if add_eos else ())]
        self.backend.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B"], special_tokens=special_tokens
        )


def _compile(special_tokens: Mapping[str, str], source: str) -> ChatTemplate:
    from jaxserve.text.chat_template import ChatTemplate  # brings jinja2, which tokenizing has no use for

    return ChatTemplate(source, special_tokens)
