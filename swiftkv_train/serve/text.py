"""From tokens to text that may be sent: whole characters only, and never a part of a stop string.

A token may end in the middle of a UTF-8 character or of a stop string, and what was sent cannot be taken back. So both
classes hold text back until later tokens settle it, and give the rest out with `flush` at the end.
"""

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 6  # enough for a word: a sentencepiece decoder drops the space before the first token it sees
MAX_HELD_TOKENS = 32  # far more than a character has
CHARACTER_TOKENS = 4  # the most that a character has, of one byte each
REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no whole character (yet)


class IncrementalDecoder:
    """The text that follows a prompt, token by token; the pieces together equal the decoding of all tokens at once.

    Decodes a short window (the tokens shown last and the ones not yet shown) instead of everything again, as vLLM does.
    It stays short where no text comes: bytes that have not become a character after many tokens are given out.
    Special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._shown, self._shown_tokens = "", 0  # of the window: the text given out, and the tokens it came from
        if self._decode().endswith(REPLACEMENT):  # a prompt cut inside a character is no context
            self._window = []
        self._start_after_shown()

    def push(self, token_id: int) -> str:
        """The text this token makes final; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode()
        if text.endswith(REPLACEMENT) or len(text) <= len(self._shown):
            return self._shorten(text) if len(self._window) - self._shown_tokens > MAX_HELD_TOKENS else ""
        new = text[len(self._shown) :]
        self._window = self._window[self._shown_tokens :]
        self._start_after_shown()
        return new

    def flush(self) -> str:
        """What is still held back, an incomplete character as U+FFFD."""
        new = self._decode()[len(self._shown) :]
        self._start_after_shown()
        return new

    def _shorten(self, text: str) -> str:
        """What is final of the window's text that ends inside a character, or shows nothing new: all but its end."""
        if not text.endswith(REPLACEMENT):
            self._window = self._window[: self._shown_tokens]
            return ""
        new = text[len(self._shown) : -1]
        # UTF-8 can be read from any byte on: the last tokens alone end in the same, perhaps unfinished, character.
        self._window = self._window[-CHARACTER_TOKENS:]
        self._shown_tokens = len(self._window)
        self._shown = self._decode()[:-1]
        return new

    def _start_after_shown(self) -> None:
        self._shown_tokens = len(self._window)
        self._shown = self._decode()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopScanner:
    """Passes text on up to the first stop string, which is left out, wherever the pieces are cut."""

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that cannot belong to a stop string any more. After `found` there is none."""
        if self.found:
            return ""
        self._held += text
        # The stop string that is complete first wins: that does not depend on how the text was cut.
        hits = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            cut = min(hits)[1]
            passed, self._held = self._held[:cut], ""
            return passed
        cut = len(self._held) - max((self._started(stop) for stop in self._stop), default=0)
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        """What was held back as the beginning of a stop string that never came."""
        passed, self._held = self._held, ""
        return passed

    def _started(self, stop: str) -> int:
        """How many characters at the end of the held text begin this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
