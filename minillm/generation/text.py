"""Prompts to text: a batch at once, the best of a beam search, or a stream without half characters and stop strings."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minillm.generation.beam import beam_search
from minillm.generation.filters import LogitsFilter, known_ids
from minillm.generation.generate import generate
from minillm.generation.next_logits import CausalModel, Seq2Seq
from minillm.generation.sampling import Sampler, greedy
from minillm.tokenizers import StreamDecoder, Tokenizer, check_same


class TextUntilStop:
    """Ids in, text out, up to the end-of-text token or the first complete stop string, neither of which is shown.

    Text that could still become a stop string is held back until it is clear.
    Example with stop=["END"]: the tokens "one E", "ND two" give "one " and then "", with `done` True.
    `continues`: the text goes on with another one, so a space at its beginning belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continues: bool = False):
        self.done = False
        self._eos_id, self._stop = tokenizer.eos_id, stop
        self._decoder, self._held = StreamDecoder(tokenizer, continues), ""

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
    model: CausalModel | Seq2Seq,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    filters: Sequence[LogitsFilter] = (),
    stop: Sequence[str] = (),
) -> list[str]:
    """Continue every prompt, as one batch; returns the continuations, without prompts and stop strings.

    For an encoder-decoder the prompts are the texts that it translates or sums up, and the result is what it writes.
    A continuation ends with the tokenizer's end-of-text token, one of the strings in `stop`, or `max_new_tokens`.
    Raises ValueError for a tokenizer that is not the model's, empty prompts, and whatever `generate` refuses.
    """
    continues = not isinstance(model, Seq2Seq)
    filters = [*_only_known(model, tokenizer), *filters]
    model, tokens, mask = _begin(model, tokenizer, prompts)
    texts = [TextUntilStop(tokenizer, _checked_stop(stop), continues) for _ in prompts]
    found = [""] * len(texts)
    for ids in generate(model, tokens, max_new_tokens=max_new_tokens, sampler=sampler, filters=filters, mask=mask):
        found = [so_far + text.push(i) for so_far, text, i in zip(found, texts, ids.tolist(), strict=True)]
        if all(text.done for text in texts):
            break
    return [so_far + text.flush() for so_far, text in zip(found, texts, strict=True)]


def stream_text(
    model: CausalModel | Seq2Seq,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    filters: Sequence[LogitsFilter] = (),
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """As `generate_text` for one prompt, but yields the text piece by piece; the pieces join to the same string."""
    text = TextUntilStop(tokenizer, _checked_stop(stop), continues=not isinstance(model, Seq2Seq))
    filters = [*_only_known(model, tokenizer), *filters]
    model, tokens, _ = _begin(model, tokenizer, [prompt])
    return _stream(generate(model, tokens, max_new_tokens=max_new_tokens, sampler=sampler, filters=filters), text)


def beam_search_text(
    model: CausalModel | Seq2Seq, tokenizer: Tokenizer, prompts: Sequence[str], **options
) -> list[list[str]]:
    """The `num_return` best continuations of every prompt, best first, as texts; for what a prompt is see
    `generate_text`. `options` are those of `beam_search`: num_beams, max_new_tokens, length_penalty, filters, ...
    """
    continues = not isinstance(model, Seq2Seq)
    options["filters"] = [*_only_known(model, tokenizer), *options.get("filters", ())]
    model, tokens, mask = _begin(model, tokenizer, prompts)
    options = {"stop_ids": [tokenizer.eos_id], "pad_id": tokenizer.eos_id, "mask": mask, **options}
    found = beam_search(model, tokens, **options).tokens.tolist()  # (B, n, L)
    return [[_text(tokenizer, ids, continues) for ids in row] for row in found]


def _text(tokenizer: Tokenizer, ids: Sequence[int], continues: bool) -> str:
    text = TextUntilStop(tokenizer, continues=continues)
    return "".join([text.push(i) for i in ids]) + text.flush()


def _stream(steps: Iterator[Tensor], text: TextUntilStop) -> Iterator[str]:
    for ids in steps:
        if piece := text.push(ids.item()):
            yield piece
        if text.done:
            return
    if rest := text.flush():
        yield rest


def _only_known(model: CausalModel | Seq2Seq, tokenizer: Tokenizer) -> list[LogitsFilter]:
    """Where the model has more ids than the tokenizer, the others never come: they stand for no text."""
    return [known_ids(tokenizer.vocab_size)] if model.config.vocab_size > tokenizer.vocab_size else []


def _begin(
    model: CausalModel | Seq2Seq, tokenizer: Tokenizer, prompts: Sequence[str]
) -> tuple[CausalModel, Tensor, Tensor | None]:
    """What continues tokens, the tokens (B, T), and their mask: the prompts, or the start of what is to be written."""
    if not isinstance(model, Seq2Seq):
        return model, *encode_prompts(model, tokenizer, prompts)
    source, source_mask = encode_sources(model, tokenizer, prompts)
    start = source.new_full((len(source), 1), model.config.decoder_start_id)
    return model.condition(source, source_mask), start, None


def encode_prompts(model: CausalModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, T) padded on the left, and the mask (B, T) of what is real; None if nothing is padded.

    Where the tokenizer's format of an input ends with the text (Llama's is `<s> text`), prompts have that format, as
    in the model's training; where it ends with a special token, the text would be over, so they are text alone.
    """
    _check_texts(model, tokenizer, prompts)
    open_ended = tokenizer.input_format.single[-1][0] == "A"
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    rows = [tokenizer.with_specials(row)[0] for row in rows] if open_ended else rows
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(
            f"prompts {empty} are empty: the model needs at least one token to start from. To begin a new document, "
            f"call generate with the end of the one before: tokens=torch.tensor([[{tokenizer.eos_id}]])"
        )
    return _padded(rows, tokenizer.pad_id, model.embed_tokens.weight.device, left=True)


def encode_sources(model: Seq2Seq, tokenizer: Tokenizer, sources: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """What an encoder reads: ids (B, S) with the tokenizer's special tokens, padded on the right, and as above."""
    _check_texts(model, tokenizer, sources)
    rows, limit = [tokenizer.with_specials(tokenizer.encode(text))[0] for text in sources], model.config.max_positions
    if long := {i: len(row) for i, row in enumerate(rows) if len(row) > limit}:
        raise ValueError(
            f"some texts have more tokens than the model's max_positions={limit} (text: tokens): {long}. Shorten them, "
            "or split them and give each part by itself"
        )
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"texts {empty} are empty, and this tokenizer adds no special token: there is nothing to read")
    return _padded(rows, tokenizer.pad_id, model.embed_tokens.weight.device, left=False)


def _check_texts(model: CausalModel | Seq2Seq, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError("prompts is a list of strings, got one string: pass [prompt]")
    if not texts:
        raise ValueError("there is no prompt: give at least one")
    if model.tokenizer_fingerprint is not None:
        check_same(model.tokenizer_fingerprint, tokenizer, "cannot generate")


def _padded(rows: list[list[int]], pad_id: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor | None]:
    """(B, longest) ids, and True where they are real; None if all are."""
    length = max(map(len, rows))
    fill = [[pad_id] * (length - len(row)) for row in rows]
    tokens = torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)], device=device)
    sizes, at = torch.tensor([len(row) for row in rows], device=device)[:, None], torch.arange(length, device=device)
    real = at >= length - sizes if left else at < sizes
    return tokens, None if real.all() else real


def _checked_stop(stop: Sequence[str]) -> Sequence[str]:
    if isinstance(stop, str):
        raise ValueError(f"stop is a list of strings, got one string: pass [{stop!r}]")
    if "" in stop:
        raise ValueError('stop holds the empty string "", which every text contains: nothing would be generated')
    return stop
