"""Greedy and beam search continue every family's models as transformers' generate does, token by token."""

import copy

import pytest
import torch
from torch import Tensor, nn

from minillm.generation import beam_search, generate_tokens

NEW = 9
PAD = 3  # stands after a row's end, on both sides; their beam search takes 0 for none given


def prompts(model: nn.Module, batch_of, padded) -> dict[str, Tensor]:
    """Three texts of unequal length: a decoder's prompts padded on the left, an encoder's sources on the right.

    Transformers counts a source's positions from its first column, padding or not, so there it must be the right.
    """
    rows = [batch_of(model, "lm", length, rows=1) for length in (7, 5, 3)]
    if model.config.kind == "decoder":
        return padded(rows, "left")
    return padded([{"source": row["source"]} for row in rows], "right")


def ours_with(model: nn.Module, batch: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """What our searches are given: a decoder, and where it starts."""
    if "source" not in batch:
        return model, batch
    start = torch.full((len(batch["source"]), 1), model.config.decoder_start_id)
    return model.condition(batch["source"], batch["source_mask"]), {"tokens": start}


def theirs_with(model: nn.Module, batch: dict[str, Tensor], start_id: int, **options) -> Tensor:
    """The new tokens of transformers' generate, told nothing but the options."""
    from transformers import GenerationConfig

    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig()  # BART's would force a last token, others sample
    name = "source" if "source" in batch else "tokens"
    mask = batch["source_mask" if name == "source" else "mask"].long()
    if type(model).__name__.startswith("T5"):
        options["use_cache"] = False  # their cache has a layer for each of the encoder's, too few for our decoder
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, decoder_start_token_id=start_id, **options
    )
    out = model.generate(batch[name], attention_mask=mask, generation_config=config)
    return out[:, 1 if name == "source" else batch[name].shape[1] :]


def a_stop_id(tokens: Tensor) -> int:
    """The id whose first appearance in a row comes latest, so that a search that heeds it ends at different steps."""
    firsts = [(row.index(token), token) for row in tokens.tolist() for token in row]
    return max(first for first in firsts if first[0] < tokens.shape[1] - 2)[1]


def test_greedy(language_model, twins, batch_of, padded):
    ours, theirs = twins(language_model)
    batch = prompts(ours, batch_of, padded)
    model, begun = ours_with(ours, batch)
    start_id = ours.config.decoder_start_id
    free = theirs_with(theirs, batch, start_id)
    assert torch.equal(generate_tokens(model, max_new_tokens=NEW, **begun), free)
    stop_id = a_stop_id(free)
    stopped = theirs_with(theirs, batch, start_id, eos_token_id=stop_id)
    found = generate_tokens(model, max_new_tokens=NEW, stop_ids=[stop_id], pad_id=PAD, **begun)
    assert torch.equal(found, stopped)
    assert stopped.tolist() != free.tolist()


@pytest.mark.parametrize("length_penalty, early_stopping", [(1.0, False), (2.0, True)])
def test_beams(language_model, length_penalty, early_stopping, twins, batch_of, padded):
    ours, theirs = twins(language_model)
    batch = prompts(ours, batch_of, padded)
    model, begun = ours_with(ours, batch)
    options = {"num_beams": 3, "length_penalty": length_penalty, "early_stopping": early_stopping}
    greedy = generate_tokens(model, max_new_tokens=NEW, **begun)
    stop_id = a_stop_id(greedy)
    expected = theirs_with(theirs, batch, ours.config.decoder_start_id, eos_token_id=stop_id, **options)
    found = beam_search(model, max_new_tokens=NEW, stop_ids=[stop_id], pad_id=PAD, **options, **begun)
    assert torch.equal(found.tokens[:, 0], expected)
