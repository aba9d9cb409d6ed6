"""Masked language modelling: hide some tokens of a text and let the model say what they were.

Sources: Devlin et al. 2018 (arXiv:1810.04805), section 3.1 and appendix A.1; whole words: the authors' later release
(github.com/google-research/bert, May 2019) and Cui et al. 2019 (arXiv:1906.08101).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.objective import Objective, check_rows
from minillm.ops import IGNORE


class WordBoundaries:
    """Which pieces of a vocabulary begin a word, so that the pieces of one word can be found again in token ids.

    pieces: every piece of the vocabulary, by id. marker: "▁" where it begins a word (sentencepiece), "##" where it goes
    on with one (WordPiece). With "▁" a word also begins after a piece that ends a line.
    """

    def __init__(self, pieces: Sequence[str], marker: str = "▁"):
        if marker not in ("▁", "##"):
            raise ValueError(f"marker is '▁' (a piece that begins a word) or '##' (one that goes on), got {marker!r}")
        if not any(piece.startswith(marker) for piece in pieces):
            raise ValueError(f"none of the {len(pieces)} pieces begins with {marker!r}: give the other marker?")
        marked = torch.tensor([piece.startswith(marker) for piece in pieces])
        self.begins = marked if marker == "▁" else ~marked
        self.ends_line = torch.tensor([marker == "▁" and piece.endswith("\n") for piece in pieces])
        self._repr = f"WordBoundaries({marker}, {hashlib.sha256(repr(list(pieces)).encode()).hexdigest()})"

    def word_ids(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids to (B, T) the number of the word each belongs to, from 0 in each row."""
        begins = self.begins[tokens]
        begins[:, 1:] |= self.ends_line[tokens[:, :-1]]
        begins[:, :1] = True
        return begins.cumsum(1) - 1

    def __repr__(self) -> str:
        return self._repr


def choose_tokens(
    allowed: Tensor,
    generator: torch.Generator,
    rate: float = 0.15,
    word_ids: Tensor | Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """(B, T) True where a token is chosen: each of `allowed` (B, T) with probability `rate`.

    With `word_ids` (B, T) neighbours with the same id are one word and chosen together; since each word is chosen with
    probability `rate` whatever its length, the expected share of tokens stays `rate`. A token that is not allowed parts
    words. As in BERT's own code a row with any allowed token has at least one chosen (unless rate is 0), or a short row
    would often teach nothing: n words are on average rate n + (1 - rate)^n chosen ones.
    """
    wrong = [] if 0 <= rate <= 1 else [f"rate={rate}: must be from 0 to 1"]
    if word_ids is not None and (word_ids := torch.as_tensor(word_ids)).shape != allowed.shape:
        wrong.append(f"word_ids are {tuple(word_ids.shape)}, the tokens {tuple(allowed.shape)}: one for each token")
    if wrong:
        raise ValueError("choose_tokens: " + "; ".join(wrong))
    draws = torch.rand(allowed.shape, generator=generator)
    if word_ids is not None:
        draws = draws.gather(1, _first_of_word(allowed, word_ids))
    draws = draws.masked_fill(~allowed, 1.0)  # a draw is below 1, and so is at least one that is allowed
    least = draws.amin(1, keepdim=True)
    return allowed & ((draws < rate) | ((draws == least) & (rate > 0)))


def _first_of_word(allowed: Tensor, word_ids: Tensor) -> Tensor:
    """(B, T) the place of the first token of each token's word."""
    begins = torch.ones_like(allowed)
    begins[:, 1:] = (word_ids[:, 1:] != word_ids[:, :-1]) | ~allowed[:, 1:] | ~allowed[:, :-1]
    places = torch.arange(allowed.shape[1]).expand(allowed.shape)
    return torch.where(begins, places, 0).cummax(1).values


@dataclass(frozen=True)
class MaskedLanguageModeling(Objective):
    """Choose 15 % of the tokens; give 80 % of these the mask, 10 % a random token, leave 10 %; label all chosen ones.

    The 10 % that stay and the 10 % that are wrong keep the model from learning that only masks are asked about.
    special_ids: never chosen and never a random replacement; padding is neither. words: choose whole words.

    Example: MaskedLanguageModeling(mask_id=4, vocab_size=8000, special_ids=tuple(tokenizer.special_ids.values()))
    """

    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    rate: float = 0.15
    mask_share: float = 0.8  # of the chosen
    random_share: float = 0.1  # of the chosen
    words: WordBoundaries | None = None

    def __post_init__(self):
        wrong = [
            f"{name}={value}: must be from 0 to 1"
            for name in ("rate", "mask_share", "random_share")
            if not 0 <= (value := getattr(self, name)) <= 1
        ]
        if not wrong and self.mask_share + self.random_share > 1 + 1e-9:
            wrong.append(f"mask_share {self.mask_share} + random_share {self.random_share} are more than all chosen")
        if outside := sorted({i for i in (self.mask_id, *self.special_ids) if not 0 <= i < self.vocab_size}):
            wrong.append(
                f"ids {outside} of mask_id and special_ids are outside the vocabulary 0..{self.vocab_size - 1}"
            )
        elif not self._ordinary().any():
            wrong.append(f"all {self.vocab_size} ids are special: there is nothing to predict")
        if self.words is not None and len(self.words.begins) != self.vocab_size:
            wrong.append(f"words knows {len(self.words.begins)} pieces, vocab_size is {self.vocab_size}")
        if wrong:
            raise ValueError("MaskedLanguageModeling: " + "; ".join(wrong))

    def __call__(
        self,
        tokens: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        word_ids: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """{"tokens" (corrupted), "mask", "labels" (-100 where not chosen)}, all (B, T).

        word_ids (B, T): the words, in place of those that `words` finds.
        """
        check_rows(self, tokens, mask, self.vocab_size)
        ordinary = self._ordinary()
        allowed = mask & ordinary[tokens]
        if word_ids is None and self.words is not None:
            word_ids = self.words.word_ids(tokens)
        chosen = choose_tokens(allowed, generator, self.rate, word_ids)
        kind = torch.rand(tokens.shape, generator=generator)
        ids = ordinary.nonzero().squeeze(1)
        random = ids[torch.randint(len(ids), tokens.shape, generator=generator)]
        corrupted = torch.where(chosen & (kind < self.mask_share + self.random_share), random, tokens)
        corrupted = corrupted.masked_fill(chosen & (kind < self.mask_share), self.mask_id)
        return {"tokens": corrupted, "mask": mask, "labels": tokens.masked_fill(~chosen, IGNORE)}

    def _ordinary(self) -> Tensor:
        """(V,) True for the ids that stand for text."""
        ordinary = torch.ones(self.vocab_size, dtype=torch.bool)
        ordinary[[self.mask_id, *self.special_ids]] = False
        return ordinary
