"""Text as it is streamed, against the decoding of everything at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graphattn.engine.text import REPLACEMENT, TextStream

# Letters that collide often, characters of one to four bytes, and the replacement character itself.
ALPHABET = "aab \n\u00e9\u20ac\U0001f600\ufffd"
pieces = st.lists(
    st.one_of(st.text(ALPHABET, max_size=4).map(str.encode), st.binary(max_size=3)), min_size=1, max_size=12
)
stops = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=3)


class Bytes:
    """A tokenizer whose ids are positions in a list of byte strings."""

    def __init__(self, tokens: Sequence[bytes]):
        self.tokens = tokens

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[token_id] for token_id in ids).decode("utf-8", "replace")


@st.composite
def splits(draw) -> list[bytes]:
    """A byte string cut into tokens anywhere, inside characters too; some tokens are empty, as special ones are."""
    whole = b"".join(draw(pieces))
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=len(whole) + 2)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)


def longest_beginning(text: str, stop: Sequence[str]) -> int:
    return max((n for one in stop for n in range(1, len(one)) if text.endswith(one[:n])), default=0)


@given(tokens=splits(), stop=stops, taking=st.lists(st.booleans(), min_size=40, max_size=40))
@example(tokens=[b"\xf0", b"\x9f\x98", b"\x80", b"a"], stop=["\U0001f600a"], taking=[True] * 40)
@example(tokens=[b"ab", b"c", b"d"], stop=["abcx", "bcd"], taking=[True] * 40)
@example(tokens=[b"a", b"\xff", b"\xff", b"b"], stop=["\ufffdb"], taking=[True] * 40)
def test_stream_is_the_text_of_all_tokens_cut_at_the_first_stop(tokens, stop, taking) -> None:
    tokenizer = Bytes(tokens)
    stream, streamed, pushed = TextStream(tokenizer.decode, stop), "", []
    for token_id in range(len(tokens)):
        stream.push(token_id)
        pushed.append(token_id)
        whole = tokenizer.decode(pushed)
        settled = not whole.endswith(REPLACEMENT)
        if settled:
            assert stream.stopped == (first_stop(whole, stop) is not None)
        if stream.stopped:
            break
        if taking[token_id % len(taking)]:
            streamed += stream.take()
            assert whole.startswith(streamed)
            if settled:  # nothing is held back without need
                assert streamed == whole[: len(whole) - longest_beginning(whole, stop)]
        assert stream.taken == streamed
    streamed += stream.take(final=True)
    whole = tokenizer.decode(pushed)
    assert streamed == stream.text == stream.taken == whole[: first_stop(whole, stop)]
    assert stream.stopped == (first_stop(whole, stop) is not None)
    assert stream.take(final=True) == stream.take() == ""


@given(tokens=splits())
def test_without_stop_strings_nothing_is_decoded_before_it_is_taken(tokens) -> None:
    calls = []
    stream = TextStream(lambda ids: calls.append(ids) or Bytes(tokens).decode(ids))
    for token_id in range(len(tokens)):
        stream.push(token_id)
    assert not calls
    assert stream.take(final=True) == b"".join(tokens).decode("utf-8", "replace")
    assert len(calls) == 1


@given(tokens=splits(), stop=stops, free=st.integers(0, 12))
def test_stop_strings_do_not_count_where_they_may_not(tokens, stop, free) -> None:
    """The first tokens may not stop; one that begins in them and ends behind them does."""
    tokenizer, streamed = Bytes(tokens), ""
    stream = TextStream(tokenizer.decode, stop)
    for token_id in range(len(tokens)):
        stream.push(token_id, may_stop=token_id >= free)
        if stream.stopped:
            assert token_id >= free
            break
        streamed += stream.take()
    streamed += stream.take(final=True)
    assert streamed == stream.text
    assert tokenizer.decode(range(token_id + 1)).startswith(streamed)


def test_a_stop_string_that_ended_where_it_might_not_stays_in_the_text() -> None:
    stream = TextStream(Bytes([b"xEN", b"D", b"y", b"END", b"z"]).decode, ["END"])
    for token_id in range(3):
        stream.push(token_id, may_stop=token_id >= 2)
        assert not stream.stopped
    stream.push(3)
    assert stream.stopped
    assert stream.text == "xENDy"


def test_a_stop_string_that_only_the_end_completes_cuts_the_text() -> None:
    """Half a character is held back until the end, where it becomes a replacement character."""
    stream = TextStream(Bytes([b"ab", b"\xe2\x82"]).decode, ["b\ufffd"])
    stream.push(0)
    stream.push(1)
    assert not stream.stopped
    assert stream.take() == "a"
    assert stream.take(final=True) == ""
    assert stream.text == "a"


def test_a_stop_string_before_half_a_character_counts_at_once() -> None:
    """And does not where it may not, whenever the rest of the character comes."""
    for may_stop in (True, False):
        stream = TextStream(Bytes([b"aEND\xe2", b"\x82\xac", b"y"]).decode, ["END"])
        stream.push(0, may_stop=may_stop)
        assert stream.stopped == may_stop and stream.take() == ("a" if may_stop else "")
        stream.push(1)
        stream.push(2)
        assert stream.take(final=True) == ("" if may_stop else "aEND\u20acy")


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_text_that_never_becomes_whole_is_not_decoded_over_and_over(stop) -> None:
    """A model may draw bytes that are no text for as long as it likes, and other requests wait for this one's text."""
    asked, tokenizer = [], Bytes([b"a", b"\x80", b"b"])
    stream = TextStream(lambda ids: asked.append(len(ids)) or tokenizer.decode(ids), stop)
    text = "".join(stream.push(token_id) or stream.take() for token_id in (0, *[1] * 500, 2)) + stream.take(final=True)
    assert text == "a" + 500 * REPLACEMENT + "b"
    assert max(asked) < 150


def test_a_tokenizer_that_raises_leaves_what_was_there() -> None:
    def decode(ids):
        if 2 in ids:
            raise KeyError(2)
        return "".join("abc"[i] for i in ids)

    stream = TextStream(decode, ["x"])
    stream.push(0)
    stream.push(1)
    assert stream.take() == "ab"
    with pytest.raises(KeyError):
        stream.push(2)
    assert stream.taken == stream.text == "ab"


def sentencepiece(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Decodes as Llama's does: "\u2581" is a space, <0x..> a byte, and the text's first space is dropped."""
    vocab = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(vocab)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


WORDS = ["\u2581", "\u2581a", "b", "\u2581\u2581", "\u2581c.", "\u20ac"]


@given(
    picks=st.lists(st.sampled_from([*WORDS, "<s>", "</s>", "<0xC3><0xA9>", "<0xF0><0x9F><0x98><0x80>"]), max_size=12)
)
@example(picks=["\u2581a", "</s>", "\u2581a"])
@example(picks=["\u2581a", "\u2581", "\u2581a"])
@example(picks=["</s>", "\u2581a"])
def test_a_tokenizer_that_drops_the_first_space(picks) -> None:
    """Special tokens and bare spaces in the middle must not make the next word look like the first."""
    tokenizer = sentencepiece(WORDS)
    tokens = [token for pick in picks for token in ([pick] if "><" not in pick else pick.replace("><", "> <").split())]
    ids = tokenizer.convert_tokens_to_ids(tokens)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    stream, streamed = TextStream(decode), ""
    for token_id in ids:
        stream.push(token_id)
        streamed += stream.take()
    streamed += stream.take(final=True)
    assert streamed == decode(ids)
