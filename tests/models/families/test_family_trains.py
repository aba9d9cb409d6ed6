"""A loaded model of each family learns eight examples of its own task by heart, with our objectives and losses."""

import torch

from minillm.data import MaskedLanguageModeling, SpanCorruption, sentinel_ids
from minillm.models.families.load import load_hf
from minillm.training import causal_lm_loss, masked_lm_loss, seq2seq_loss

ROWS, LENGTH, VOCAB = 8, 8, 61
STEPS = 110
SPECIAL = (0, 1, 2, 3, 4)


def test_it_learns(learner, checkpoint):
    """From a loss worse than chance to next to nothing; dropout is off, so that eight examples can be known exactly."""
    model, generator = load_hf(checkpoint(learner)[1]), torch.Generator().manual_seed(0)
    tokens = torch.randint(len(SPECIAL), 50, (ROWS, LENGTH), generator=generator)
    tokens[:, 0] = torch.arange(len(SPECIAL), len(SPECIAL) + ROWS)  # the first token tells the rows apart
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if model.config.kind == "decoder":
        loss_fn, batch = causal_lm_loss, {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    elif model.config.kind == "encoder":
        hide = MaskedLanguageModeling(mask_id=60, vocab_size=VOCAB, special_ids=SPECIAL, rate=0.4)
        loss_fn, batch = masked_lm_loss, hide(tokens, mask, generator)
        batch["tokens"][:, 0], batch["labels"][:, 0] = tokens[:, 0], -100
    else:
        start = model.config.decoder_start_id
        cut = SpanCorruption(sentinel_ids(VOCAB, 8), VOCAB, eos_id=1, pad_id=0, decoder_start_id=start)
        loss_fn, batch = seq2seq_loss, cut(tokens, mask, generator)
    lr = 1e-2 if model.config.logit_scale == 1.0 else 3e-2  # logits scaled down need larger weights
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        losses.append(loss.value.item())
        loss.value.backward()
        optimizer.step()
    assert losses[0] > 2.0 and losses[-1] < 0.05, f"{losses[0]:.2f} -> {losses[-1]:.3f}"
