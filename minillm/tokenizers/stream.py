"""Text while it is being generated: one token may hold only a part of a character."""

import codecs

from minillm.tokenizers.base import Tokenizer


class StreamDecoder:
    """Turns ids into text one at a time; the strings concatenate to exactly `tokenizer.decode(all ids)`.

    Example: the two bytes of "é" as two byte tokens give "" and then "é".
    continues: the ids go on with a text, so that a space before the first word is not the tokenizer's own and stays.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self.tokenizer = tokenizer
        self._drop_space = tokenizer.leading_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is still incomplete."""
        if not 0 <= token < self.tokenizer.vocab_size:
            raise ValueError(f"id {token} is outside the vocabulary of {self.tokenizer.vocab_size} ids")
        data = self.tokenizer.token_bytes(int(token))
        if self._drop_space and data:
            data, self._drop_space = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was still held back, as replacement characters; call it once after the last token."""
        return self._utf8.decode(b"", final=True)
