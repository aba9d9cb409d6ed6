"""What the base forgets: its loss on text that it was pretrained for, before and after it was tuned to a task."""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.data import MaskedLanguageModeling, SpanCorruption, TokenFile, read_documents
from minillm.data.objective import Objective
from minillm.evaluation import evaluate
from minillm.models.heads import Head
from minillm.peft import activate, tunings_of
from minillm.recipes.compare.config import CompareConfig
from minillm.recipes.locate import Loaded
from minillm.tokenizers import Tokenizer
from minillm.training import causal_lm_loss, masked_lm_loss, seq2seq_loss

LOSSES = {"decoder": causal_lm_loss, "encoder": masked_lm_loss, "encoder_decoder": seq2seq_loss}
ROWS = 16  # in a batch


class HeldOut:
    """Text of the base's own kind, and its loss (nats per token) by the base's own objective and LM head.

    `missing` says why it cannot be measured, if so. What is masked or cut out is drawn once, the same for every method.
    """

    def __init__(self, base: Loaded, folder: Path, config: CompareConfig):
        self.base, self.kind, self.batches = base.model, base.model.config.kind, []
        self.missing = self._missing(base, folder, config)
        if not self.missing:
            rows = _rows(_ids(base.tokenizer, folder, config), config.length, config.held_out_rows)
            self.batches = [self._batch(base.tokenizer, part) for part in rows.split(ROWS)]
            self.before = self.loss(copy.deepcopy(base.model))

    def _missing(self, base: Loaded, folder: Path, config: CompareConfig) -> str:
        if getattr(base.model, "lm_head", None) is None:
            return "the base has no LM head"
        if not config.held_out and not _recorded(folder).is_dir():
            return "no held-out text of the base: give held_out=FILE"
        if self.kind == "encoder" and base.tokenizer.mask_id is None:
            return "the tokenizer has no mask token"
        if self.kind == "encoder_decoder" and not sentinels(base.tokenizer):
            return "the tokenizer has no sentinels <extra_id_0>, ..."
        return ""

    def changes(self, model: nn.Module) -> dict[str, float | None]:
        """The change of the loss with the method on, and off; None where it cannot be measured or switched off.

        `model` is left with its method off, where that can be.
        """
        if self.missing:
            return {"on": None, "off": None}
        on = self.loss(model) - self.before
        if not all(tuning.config.keeps_base for tuning in tunings_of(model).values()):
            return {"on": on, "off": None}
        activate(model)
        return {"on": on, "off": self.loss(model) - self.before}

    def loss(self, model: nn.Module) -> float:
        """Of the body of `model` behind the base's own LM head."""
        with self._writer(model) as writer:
            return evaluate(writer, self.batches, LOSSES[self.kind])["loss"]

    @contextlib.contextmanager
    def _writer(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model` as a language model: with a new head on its body, the base's LM head takes that one's place."""
        if not isinstance(model, Head) or hasattr(model, "lm_head"):
            yield model
        elif isinstance(self.base, Head):
            head = copy.deepcopy(self.base).to(next(model.parameters()).device)
            head.body = model.body
            head.tie_weights()
            yield head
        else:
            stack = getattr(model.body, "decoder", model.body)
            stack.lm_head = copy.deepcopy(self.base.lm_head).to(next(model.parameters()).device)
            stack.tie_weights()
            try:
                yield model.body
            finally:
                stack.lm_head = None

    def _batch(self, tokenizer: Tokenizer, rows: Tensor) -> dict[str, Tensor]:
        if self.kind == "decoder":
            return {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
        if self.kind == "encoder":
            rows = torch.tensor([tokenizer.with_specials(row)[0] for row in rows.tolist()])
        mask = torch.ones_like(rows, dtype=torch.bool)
        return self._objective(tokenizer)(rows, mask, torch.Generator().manual_seed(0))

    def _objective(self, tokenizer: Tokenizer) -> Objective:
        config = self.base.config
        if self.kind == "encoder":
            return MaskedLanguageModeling(tokenizer.mask_id, config.vocab_size, tuple(tokenizer.special_ids.values()))
        ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id or 0}
        return SpanCorruption(sentinels(tokenizer), config.vocab_size, decoder_start_id=config.decoder_start_id, **ids)


def sentinels(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of <extra_id_0>, <extra_id_1>, ..., as T5's tokenizers have them."""
    names = {name: re.fullmatch(r"<extra_id_(\d+)>", name) for name in tokenizer.special_ids}
    found = {int(match[1]): tokenizer.special_ids[name] for name, match in names.items() if match}
    return tuple(found[number] for number in sorted(found))


def _recorded(folder: Path) -> Path:
    """Where a pretraining run keeps what it held out, seen from its model."""
    return folder.parent / "data" / "held_out"


def _ids(tokenizer: Tokenizer, folder: Path, config: CompareConfig) -> Tensor:
    if not config.held_out:
        return torch.from_numpy(TokenFile.open(_recorded(folder)).tokens.astype("int64"))
    rows = [[*tokenizer.encode(document.full_text), tokenizer.eos_id] for document in read_documents(config.held_out)]
    return torch.tensor([i for row in rows for i in row])


def _rows(ids: Tensor, length: int, most: int) -> Tensor:
    """Windows (rows, length) from the beginning; special tokens around them find room as well."""
    width = length - 2
    count = min(most, len(ids) // width)
    if not count:
        raise ValueError(f"held_out: {len(ids)} tokens do not fill one row of length={length}: give more text")
    return ids[: count * width].reshape(count, width)
