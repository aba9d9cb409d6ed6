"""Prompts to text: a batch at once, or one prompt as a stream that never shows half a character or a stop string."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minillm.generation.generate import generate
from minillm.generation.sampling import Sampler, greedy
from minillm.models import Decoder
from minillm.tokenizers import StreamDecoder, Tokenizer, check_same


class TextUntilStop:
    """Ids in, text out, up to the end-of-text token or the first complete stop string, neither of which is shown.

    Text that could still become a stop string is held back until it is clear.
    Example with stop=["END"]: the tokens "one E", "ND two" give "one " and then "", with `done` True.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.done = False
        self._eos_id, self._stop = tokenizer.eos_id, stop
        self._decoder, self._held = StreamDecoder(tokenizer), ""

    def push(self, token: int) -> str:
        """The text that is certain after this token; "" once done."""
        if self.done:
            return ""
        if token == self._eos_id:
            return self.flush()
        self._held += self._decoder.push(token)
        if ends := [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]:
            self.done = True  # the stop string that was complete first, whatever pieces the text came in
            return self._held[: min(ends)[1]]
        cut = len(self._held) - self._undecided()
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """No more tokens will come: what was held back is text after all."""
        if self.done:
            return ""
        self.done = True
        return self._held + self._decoder.flush()

    def _undecided(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    stop: Sequence[str] = (),
) -> list[str]:
    """Continue every prompt, as one batch; returns the continuations, without prompts and stop strings.

    A continuation ends with the tokenizer's end-of-text token, one of the strings in `stop`, or `max_new_tokens`.
    Raises ValueError for a tokenizer that is not the model's, empty prompts, and whatever `generate` refuses.
    """
    tokens, mask = encode_prompts(model, tokenizer, prompts)
    texts = [TextUntilStop(tokenizer, _checked_stop(stop)) for _ in prompts]
    found = [""] * len(texts)
    for ids in generate(model, tokens, max_new_tokens=max_new_tokens, sampler=sampler, mask=mask):
        found = [so_far + text.push(i) for so_far, text, i in zip(found, texts, ids.tolist(), strict=True)]
        if all(text.done for text in texts):
            break
    return [so_far + text.flush() for so_far, text in zip(found, texts, strict=True)]


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """As `generate_text` for one prompt, but yields the text piece by piece; the pieces join to the same string."""
    tokens, _ = encode_prompts(model, tokenizer, [prompt])
    text = TextUntilStop(tokenizer, _checked_stop(stop))
    steps = generate(model, tokens, max_new_tokens=max_new_tokens, sampler=sampler)
    return _stream(steps, text)


def _stream(steps: Iterator[Tensor], text: TextUntilStop) -> Iterator[str]:
    for ids in steps:
        if piece := text.push(ids.item()):
            yield piece
        if text.done:
            return
    if rest := text.flush():
        yield rest


def encode_prompts(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, T) padded on the left, and the mask (B, T) of what is real; None if nothing is padded."""
    if isinstance(prompts, str):
        raise ValueError("prompts is a list of strings, got one string: pass [prompt]")
    if model.tokenizer_fingerprint is not None:
        check_same(model.tokenizer_fingerprint, tokenizer, "cannot generate")
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompts {empty} are empty: the model needs at least one token to start from")
    if not rows:
        raise ValueError("there is no prompt: give at least one")
    length, device = max(map(len, rows)), model.embed_tokens.weight.device
    tokens = torch.tensor([[tokenizer.pad_id] * (length - len(row)) + row for row in rows], device=device)
    real = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows], device=device)
    return tokens, None if real.all() else real


def _checked_stop(stop: Sequence[str]) -> Sequence[str]:
    if isinstance(stop, str):
        raise ValueError(f"stop is a list of strings, got one string: pass [{stop!r}]")
    if "" in stop:
        raise ValueError('stop holds the empty string "", which every text contains: nothing would be generated')
    return stop
