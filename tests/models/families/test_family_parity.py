"""Every family and every head gives what transformers gives: on plain input, padded, and piece by piece."""

import pytest
import torch

from minillm.layers import KVCache
from minillm.models import HEADS, Decoder, Encoder, EncoderDecoder
from minillm.models.families.load import load_hf

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs(answering, dtype, twins, batch_of, ask_theirs, error_of, agree):
    ours, theirs = twins(answering, dtype)
    batch = batch_of(ours, answering.task)
    with torch.no_grad():
        expected, _ = ask_theirs(theirs, answering, batch)
        agree(answering, "outputs", dtype, error_of(ours(**batch), expected))


def test_the_task_is_read(member, twins):
    """Which head there is, and for how many labels, stands in config.json alone."""
    ours, theirs = twins(member)
    if member.task in ("lm", "body"):
        assert isinstance(ours, Decoder | Encoder | EncoderDecoder)
        assert (getattr(ours, "lm_head", None) is not None) == (member.task == "lm")
    else:
        assert type(ours) is HEADS[member.task] and ours.head_config.task == member.task
    if member.task in ("classification", "multi_label", "regression", "tagging"):
        assert ours.head_config.num_labels == theirs.config.num_labels == (1 if member.task == "regression" else 3)


def test_nothing_in_the_oracle_is_vacuous(answering, twins, batch_of, ask_theirs):
    """Each input has its say in the answers that are compared: words, their order, and the mask."""
    ours, theirs = twins(answering, torch.float64)
    batch = batch_of(ours, answering.task)
    words = batch.get("source", batch["tokens"])
    another, swapped = words.clone(), words.clone()
    another[..., 4] = (another[..., 4] - 4) % 56 + 5
    swapped[..., 2], swapped[..., 4] = words[..., 4], words[..., 2]
    hidden = torch.ones_like(words)
    hidden[..., 4] = 0
    with torch.no_grad():
        expected, _ = ask_theirs(theirs, answering, batch)
        assert expected.std() > 0.05 * expected.abs().max()
        if expected.dim() == 3:
            assert expected.std(1).mean() > 0.02 * expected.abs().max()  # positions differ
        name = "source" if "source" in batch else "tokens"
        for change in ({name: another}, {name: swapped}, {"mask": hidden}):
            changed, _ = ask_theirs(theirs, answering, {**batch, **change})
            largest = (changed - expected).abs().max()
            assert largest > 1e-2 * expected.abs().max(), f"{list(change)} changes nothing"
    if answering.task in ("lm", "masked_lm"):
        assert expected.softmax(-1).amax(-1).mean() < 0.9  # not one token alone


PER_TOKEN = ("lm", "masked_lm", "tagging", "span", "body")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(answering, side, twins, batch_of, padded, ask_theirs, error_of):
    """A padded row gets what transformers gives the same row alone, so nothing but its real tokens counts."""
    ours, theirs = twins(answering)
    rows = [batch_of(ours, answering.task, length, rows=1) for length in (11, 7, 3)]
    batch = padded(rows, side)
    with torch.no_grad():
        expected = [ask_theirs(theirs, answering, row)[0] for row in rows]
        scale = max(scores.abs().max() for scores in expected)
        for found, mask, scores in zip(ours(**batch), batch["mask"], expected, strict=True):
            real = found[mask] if answering.task in PER_TOKEN else found
            assert error_of(real[None], scores, scale) < 1e-5
            if answering.task == "span":
                assert found[~mask].isneginf().all()


def test_without_token_types_all_are_the_first(encoder_head, twins, batch_of, ask_theirs, error_of):
    ours, theirs = twins(encoder_head)
    batch = batch_of(ours, encoder_head.task)
    batch.pop("token_types", None)
    with torch.no_grad():
        expected, _ = ask_theirs(theirs, encoder_head, batch)
        assert error_of(ours(**batch), expected) < 1e-5


def test_body_of_a_pooled_model(pooled, checkpoint, twins, batch_of, error_of):
    _, theirs = twins(pooled)
    ours = load_hf(checkpoint(pooled)[1], task="body")
    tokens = batch_of(ours, "body")["tokens"]
    with torch.no_grad():
        assert error_of(ours(tokens), theirs(tokens).last_hidden_state) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pieces", [[6, 5], [1] * 11, [3, 1, 7]], ids=str)
def test_cached_in_pieces(language_model, dtype, pieces, twins, batch_of, padded, ask_theirs, error_of, agree):
    """Also past the sliding windows, and with padding on the left; the oracle reads each row whole and alone."""
    ours, theirs = twins(language_model, dtype)
    rows = [batch_of(ours, "lm", length, rows=1) for length in (11, 6)]
    if ours.config.kind == "encoder_decoder":  # targets as long as the others' texts
        rows = [batch_of(ours, "lm", length + 2, rows=1) for length in (11, 6)]
    batch = padded(rows, "left")
    cache, found = [KVCache() for _ in ours.layers], []
    source, source_mask = batch.pop("source", None), batch.pop("source_mask", None)
    model = ours if source is None else ours.condition(source, source_mask)
    with torch.no_grad():
        for piece in batch["tokens"].split(pieces, dim=1):
            end = cache[0].offset + piece.shape[1]
            found.append(model(piece, mask=batch["mask"][:, :end], cache=cache))
        for i, row in enumerate(rows):
            expected, _ = ask_theirs(theirs, language_model, row)
            real = torch.cat(found, dim=1)[i][batch["mask"][i]]
            agree(language_model, "cached outputs", dtype, error_of(real[None], expected))


def test_the_start_token_is_theirs(shifting, twins, batch_of, error_of):
    """From labels alone T5 and BART make their decoder's inputs; mBART's begin with the last label, a language."""
    ours, theirs = twins(shifting)
    batch = batch_of(ours, "lm")
    labels = torch.cat([batch["tokens"][:, 1:], torch.full((3, 1), 7)], dim=1)
    with torch.no_grad():
        expected = theirs(input_ids=batch["source"], labels=labels).logits
        assert error_of(ours(**batch), expected) < 1e-5
