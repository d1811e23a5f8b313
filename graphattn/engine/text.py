"""Tokens to text as they come, and stop strings wherever they fall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

DECODE_OPTIONS = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
REPLACEMENT = "\ufffd"  # what a tokenizer gives for bytes that are no whole character yet
MOST_TRIES = 64  # at text that ends in no whole character; then it is none, and is not decoded over and over


def decoder_of(tokenizer) -> Callable[[Sequence[int]], str] | None:
    """Ids to text as a tokenizer of transformers does it; None without one."""
    return None if tokenizer is None else partial(tokenizer.decode, **DECODE_OPTIONS)


class TextStream:
    """The text of one request, decoded piece by piece; without stop strings not before it is taken.

    Args:
        decode: ids to text.
        stop: strings that end the request; the text is cut before the first that appears.

    Attributes:
        text: everything decoded so far, cut before a stop string.
        stopped: whether a stop string has appeared.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._prefix = self._read = 0  # a piece is decoded with the piece before it, since joins change spaces
        self._tries = 0  # to decode what is behind it, in vain
        self._taken = self._searched = 0  # lengths of text; stop strings that end in what was searched do not count

    @property
    def taken(self) -> str:
        """What `take` has returned so far."""
        return self.text[: self._taken]

    def push(self, token_id: int, *, may_stop: bool = True) -> None:
        """Adds a token; with `may_stop` false stop strings that end in it do not count."""
        self._ids.append(token_id)
        if self._stop:
            self._advance(may_stop=may_stop)

    def take(self, *, final: bool = False) -> str:
        """New text since the last call; what may become a stop string or a whole character is held back.

        Args:
            final: nothing will follow, so nothing is held back.
        """
        self._advance(final=final)
        end = len(self.text) - (0 if final or self.stopped else self._held_back())
        piece, self._taken = self.text[self._taken : end], max(end, self._taken)
        return piece

    def _advance(self, *, final: bool = False, may_stop: bool = True) -> None:
        if self.stopped or self._read == len(self._ids):
            return
        known = self._decode(self._ids[self._prefix : self._read]) if self._prefix < self._read else ""
        piece = self._decode(self._ids[self._prefix :])
        is_whole = final or not piece.endswith(REPLACEMENT) or self._tries >= MOST_TRIES
        text = self.text + (piece if is_whole else piece.rstrip(REPLACEMENT))[len(known) :]
        ended, self._searched = self._searched, len(text)
        if may_stop:
            found = [at for stop in self._stop if (at := text.find(stop, max(0, ended - len(stop) + 1))) >= 0]
            if found:
                self.text, self.stopped = text[: min(found)], True
                return
        if is_whole:
            # The next piece needs one before it that has text: behind a special token alone, tokenizers that strip a
            # leading space would take the next word for the first.
            if len(piece) > len(known):
                self._prefix = self._read
            self._read, self.text, self._tries = len(self._ids), text, 0
        else:
            self._tries += 1

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
