"""A byte tokenizer small enough to reason about in tests: token id b is byte b, then a few specials."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxserve.text.token_bytes import BYTE_LEVEL_ALPHABET
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tokenizer_parts import TokenizerParts

BOS, EOS, IM_START, IM_END, TOOL_CALL, TOOL_CALL_END = range(256, 262)
VOCAB_SIZE = 262

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    *,
    add_bos: bool = False,
    add_eos: bool = False,
    chat_template: str | None = CHAT_TEMPLATE,
    added: tuple[str, ...] = ("<tool_call>", "</tool_call>"),
    special: tuple[str, ...] = (),
) -> Tokenizer:
    """A fresh tokenizer with a ChatML-like template.

    Ids 0-255 are the bytes; 256-259 are the control tokens BOS, EOS, IM_START, IM_END ("<|bos|>", "<|eos|>",
    "<|im_start|>", "<|im_end|>"); 260 and 261 are "<tool_call>" and "</tool_call>", or others, added but not special.
    `special` tokens come last.
    """
    backend = Backend(models.BPE(vocab=dict(BYTE_LEVEL_ALPHABET), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
        ]
        + [AddedToken(text, special=False, normalized=False) for text in added]
        + [AddedToken(text, special=True, normalized=False) for text in special]
    )
    return Tokenizer(
        TokenizerParts(
            backend,
            bos_token="<|bos|>",
            eos_token="<|eos|>",
            add_bos=add_bos,
            add_eos=add_eos,
            chat_templates={} if chat_template is None else {"default": chat_template},
        )
    )


ASCII_VOCAB_SIZE = 100
ASCII_EOS, ASCII_MARK = 98, 99


def ascii_tokenizer() -> Tokenizer:
    """A tokenizer of 100 tokens, for models as small: some bytes and pieces of JSON, then "<|eos|>" and "<mark>"."""
    characters = (
        '{}[]":, \n_-.<>/\\' + "0123456789" + "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )
    written = {byte: character for character, byte in BYTE_LEVEL_ALPHABET.items()}
    pieces = [written[ord(character)] for character in characters]
    merges = [
        ("n", "a"),
        ("m", "e"),
        ("na", "me"),
        ('"', ":"),
        ("t", "r"),
        ("u", "e"),
        ("tr", "ue"),
        ("y", "e"),
    ]
    merges += [("ye", "s"), ("a", "g"), ("ag", "e"), (",", '"'), ("{", '"'), ("s", "e"), ("1", "2")]
    pieces += ["".join(pair) for pair in merges]
    pieces += ["Ġ" + letter for letter in "abcdefghijk"[: ASCII_VOCAB_SIZE - 2 - len(pieces)]]
    assert len(set(pieces)) == ASCII_VOCAB_SIZE - 2
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|eos|>", "<mark>")])
    return Tokenizer(TokenizerParts(backend, eos_token="<|eos|>"))
