"""A tokenizer whose tokens are bytes, and a few tags: what splits characters splits everything."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.server.plugins.tokenizer import PluginTokenizer
from jaxserve.text.token_bytes import BYTE_LEVEL_ALPHABET
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer_parts import TokenizerParts

_LONGEST_TAG = 64  # characters; longer texts that a parser looks up are no tokens


def byte_tokenizer(tags: Iterable[str] = ()) -> Tokenizer:
    """Ids 0 to 255 are the bytes; each tag is one token more."""
    backend = Backend(models.BPE(vocab=dict(BYTE_LEVEL_ALPHABET), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in sorted(set(tags))])
    return Tokenizer(TokenizerParts(backend))


class ProbingTokenizer(PluginTokenizer):
    """Has every token that a parser asks for, and remembers which."""

    def __init__(self) -> None:
        tokenizer = byte_tokenizer()
        super().__init__(tokenizer)
        self._probed = _ProbedVocab(tokenizer.get_vocab())

    def get_vocab(self) -> dict[str, int]:
        """A vocabulary that has everything."""
        return self._probed

    @property
    def vocab(self) -> dict[str, int]:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only, as there
        """A vocabulary that has everything."""
        return self._probed

    def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:
        """One token, if the text may be a tag."""
        return [self._probed[text]] if 1 < len(text) <= _LONGEST_TAG else super().encode(text)

    @property
    def tags(self) -> list[str]:
        """What was asked for and is no byte."""
        return sorted(tag for tag in self._probed.asked if 1 < len(tag) <= _LONGEST_TAG)


class _ProbedVocab(dict[str, int]):
    def __init__(self, tokens: dict[str, int]) -> None:
        super().__init__(tokens)
        self.asked: set[str] = set()

    def __missing__(self, token: str) -> int:
        self.asked.add(token)
        self[token] = len(self)
        return self[token]

    def __contains__(self, token: object) -> bool:
        return isinstance(token, str) and self[token] >= 0

    def get(self, token: str, default: object = None) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self[token]
