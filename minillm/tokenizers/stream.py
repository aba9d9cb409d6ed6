"""Text while it is being generated: one token may hold only a part of a character."""

import codecs

from minillm.tokenizers.base import Tokenizer


class StreamDecoder:
    """Turns ids into text one at a time; the strings concatenate to exactly `tokenizer.decode(all ids)`.

    Example: the two bytes of "é" as two byte tokens give "" and then "é".
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is still incomplete."""
        if not 0 <= token < self.tokenizer.vocab_size:
            raise ValueError(f"id {token} is outside the vocabulary of {self.tokenizer.vocab_size} ids")
        return self._utf8.decode(self.tokenizer.token_bytes(int(token)))

    def flush(self) -> str:
        """What was still held back, as replacement characters; call it once after the last token."""
        return self._utf8.decode(b"", final=True)
