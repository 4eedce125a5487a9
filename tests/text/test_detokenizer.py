"""Incremental text against decoding everything at once."""

import itertools
from operator import add
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.detokenizer import Detokenizer
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.tokenizer_parts import TokenizerParts
from tests.tiny import BOS, EOS, IM_END, TOOL_CALL, VOCAB_SIZE, byte_tokenizer

TINY = byte_tokenizer()
PARTY = [*"🎉".encode()]
HALF = PARTY[:2]


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("spm")
    data = Path(__file__).parents[1] / "data" / "text" / "spm_prefix.model"
    (directory / "tokenizer.model").write_bytes(data.read_bytes())
    return load_tokenizer(directory)


def pushed(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    """What comes out when the ids go in in chunks."""
    bounds = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(bounds)]


chunks = st.lists(st.integers(0, 100), max_size=12)
text_ids = st.text(max_size=20).map(lambda text: TINY.encode(text))
any_ids = st.lists(st.integers(0, VOCAB_SIZE + 2), max_size=30)


@given(ids=st.one_of(text_ids, any_ids, st.builds(add, text_ids, any_ids)), cuts=chunks, skip=st.booleans())
def test_any_chunking_joins_to_the_librarys_own_decode(ids: list[int], cuts: list[int], skip: bool) -> None:
    ids = [*ids, ord("a")]  # behind which no character is incomplete
    texts = pushed(Detokenizer(TINY, [], skip_special_tokens=skip), ids, cuts)
    assert "".join(texts) == TINY.backend.decode(ids, skip_special_tokens=skip) == TINY.decode(ids, skip)


@given(text=st.text(max_size=20), prompt=st.text(max_size=5))
def test_valid_text_never_shows_half_a_character(text: str, prompt: str) -> None:
    detokenizer = Detokenizer(TINY, TINY.encode(prompt))
    ids, out = TINY.encode(text, add_special_tokens=False), ""
    for i, token_id in enumerate(ids):
        out += detokenizer.push([token_id])
        assert out == bytes(b for b in ids[: i + 1] if b < 256).decode(errors="ignore")
    assert out == text


@given(data=st.data())
def test_sentencepiece_any_chunking_joins_to_the_whole(spm: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, spm.vocab_size - 1), max_size=20))
    ids += spm.encode("a", add_special_tokens=False)  # behind which no character is incomplete
    cuts = data.draw(chunks)
    assert "".join(pushed(Detokenizer(spm, []), ids, cuts)) == spm.decode(ids)
    # read on from a prompt, nothing is dropped from the front
    prompt = spm.encode("Hello")
    texts = pushed(Detokenizer(spm, prompt), ids, cuts)
    assert spm.decode(prompt) + "".join(texts) == spm.decode(prompt + ids)


@given(text=st.text(alphabet="abc é你🎉ß\n", max_size=20))
def test_sentencepiece_text_comes_back_as_the_library_decodes_it(spm: Tokenizer, text: str) -> None:
    ids = spm.encode(text, add_special_tokens=False)
    out = "".join(pushed(Detokenizer(spm, []), ids, list(range(40))))
    assert out == spm.backend.decode(ids) == text


def test_a_character_comes_with_its_last_byte() -> None:
    detokenizer = Detokenizer(TINY, [])
    assert [detokenizer.push([b]) for b in PARTY] == ["", "", "", "🎉"]


def test_a_character_cut_off_is_not_there() -> None:
    assert Detokenizer(TINY, []).push([97, *HALF]) == "a"


def test_invalid_bytes_come_out_as_soon_as_they_are_known_to_be() -> None:
    detokenizer = Detokenizer(TINY, [])
    assert [detokenizer.push([b]) for b in (0xFF, *HALF, 97, 0x80)] == ["\ufffd", "", "", "\ufffda", "\ufffd"]


def test_a_replacement_character_that_the_model_writes_comes_at_once() -> None:
    assert Detokenizer(TINY, []).push([*"\ufffd".encode()]) == "\ufffd"


def test_skipped_special_tokens_are_not_there_at_all() -> None:
    detokenizer = Detokenizer(TINY, [])
    assert detokenizer.push([*HALF, IM_END, *PARTY[2:], TOOL_CALL]) == "🎉<tool_call>"
    shown = Detokenizer(TINY, [], skip_special_tokens=False)
    assert shown.push([97, IM_END, EOS]) == "a<|im_end|><|eos|>"
    some = Detokenizer(TINY, [], kept_special_tokens=[IM_END])
    assert some.push([97, IM_END, EOS]) == "a<|im_end|>"


def test_the_answer_completes_the_character_that_the_prompt_began() -> None:
    assert Detokenizer(TINY, [97, *PARTY[:3]]).push(PARTY[3:]) == "🎉"
    assert Detokenizer(TINY, [*PARTY[:1], BOS, PARTY[1]]).push([*PARTY[2:], 97]) == "🎉a"
    assert Detokenizer(TINY, [97, *PARTY]).push([97]) == "a"


def test_the_leading_space_stays_only_behind_visible_text(spm: Tokenizer) -> None:
    hello = spm.encode("Hello", add_special_tokens=False)
    bos = [1]
    assert Detokenizer(spm, []).push(hello) == "Hello"
    assert Detokenizer(spm, bos).push(hello) == "Hello"
    assert Detokenizer(spm, bos, skip_special_tokens=False).push(hello) == " Hello"
    assert Detokenizer(spm, bos + hello).push(hello) == " Hello"


@pytest.mark.parametrize(("spaces", "text"), [(True, "<|eos|> <pad>a <pad>"), (False, "<|eos|><pad>a <pad>")])
def test_spaces_that_added_tokens_bring_along(spaces: bool, text: str) -> None:
    backend = byte_tokenizer().backend
    backend.add_special_tokens([" <pad>"])
    pad = backend.token_to_id(" <pad>")
    assert pad is not None
    tokenizer = Tokenizer(TokenizerParts(backend))
    detokenizer = Detokenizer(tokenizer, [97], False, spaces_between_special_tokens=spaces)
    assert detokenizer.push([EOS, pad, 97, pad]) == text
