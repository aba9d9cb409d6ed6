"""The recurrent language model and encoder-decoder: against torch, against loops by hand, and learning."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.data import Document, PackedLoader, TokenFile, write_tokens
from minillm.generation import generate_tokens
from minillm.generation.beam import beam_search
from minillm.layers import KVCache, StaticKVCache
from minillm.models.recurrent import RecurrentConfig, RecurrentLM
from minillm.models.recurrent_seq2seq import RecurrentEncoderDecoder
from minillm.tokenizers import ByteTokenizer
from minillm.training import TrainConfig, Trainer, causal_lm_loss, seq2seq_loss

EXACT = dict(rtol=0, atol=1e-10)  # float64
TINY = dict(vocab_size=23, hidden_size=12, num_layers=2, embed_size=8)


def make(kind=RecurrentLM, **fields) -> nn.Module:
    return kind(RecurrentConfig(**TINY | fields)).double().eval()


def new_cache(model: nn.Module) -> list[KVCache]:
    return [KVCache() for _ in model.layers]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 23, (3, 9))


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(9) < torch.tensor([9, 4, 7])[:, None]


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
@pytest.mark.parametrize("tied", [False, True])
def test_language_model_is_embedding_torch_layers_and_head(cell, tied, tokens):
    model = make(cell=cell, tie_embeddings=tied, num_layers=1)
    theirs = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell](8, 12, batch_first=True).double()
    ours = model.layers[0][0]
    weights = [
        ours.input_proj.weight,
        ours.hidden_proj.weight,
        ours.input_proj.bias,
        torch.zeros_like(theirs.bias_hh_l0),
    ]
    with torch.no_grad():
        for mine, other in zip(weights, theirs.parameters(), strict=True):
            other.copy_(mine)
    y, _ = theirs(F.embedding(tokens, model.embed_tokens.weight))
    if tied:
        assert model.lm_head.weight is model.embed_tokens.weight
        expected = (y @ model.out_proj.weight.T + model.out_proj.bias) @ model.embed_tokens.weight.T
    else:
        expected = y @ model.lm_head.weight.T
    torch.testing.assert_close(model(tokens), expected, **EXACT)
    torch.testing.assert_close(model(embeds=model.embed_tokens(tokens)), expected, **EXACT)


def test_equal_sizes_need_no_projection():
    assert not list(make(embed_size=None).out_proj.parameters())
    assert not list(make(tie_embeddings=False).out_proj.parameters())
    model = make(tie_embeddings=False)
    assert sorted(set(model.state_dict())) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_step_by_step_is_one_pass(cell, tokens):
    model = make(cell=cell)
    cache = new_cache(model)
    steps = [model(part, cache=cache) for part in tokens.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), **EXACT)
    assert cache[0].offset == 9


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side, tokens, mask):
    model, mask = make(), mask if side == "right" else mask.flip(1)
    y = model(tokens, mask=mask)
    for row in range(3):
        torch.testing.assert_close(y[row, mask[row]], model(tokens[row, mask[row]][None])[0], **EXACT)


def test_the_carried_state_has_a_value_but_no_gradient(tokens):
    """Truncated backpropagation through time: window after window with a cache."""
    model = make()
    cache = new_cache(model)
    model(tokens[:, :5], cache=cache)
    assert not any(c.keys.requires_grad or c.values.requires_grad for c in cache)
    given = torch.autograd.grad(model(tokens[:, 5:], cache=cache).sum(), list(model.recurrent.parameters()))
    _, state = model.recurrent(model.embed_tokens(tokens[:, :5]))
    y, _ = model.recurrent(model.embed_tokens(tokens[:, 5:]), state=state.detach())
    expected = torch.autograd.grad(model.lm_head(model.out_proj(y)).sum(), list(model.recurrent.parameters()))
    torch.testing.assert_close(given, expected, **EXACT)


def test_truncate_gives_the_gradient_of_windows_with_a_cache(tokens):
    whole, model = make(truncate=4), make()
    whole.load_state_dict(model.state_dict())
    cache = new_cache(model)
    torch.testing.assert_close(whole(tokens), model(tokens), **EXACT)
    weight = model.layers[0][0].hidden_proj.weight
    windows = sum(model(part, cache=cache).square().sum() for part in tokens.split(4, dim=1))
    given = torch.autograd.grad(whole(tokens).square().sum(), whole.layers[0][0].hidden_proj.weight)
    torch.testing.assert_close(given, torch.autograd.grad(windows, weight), **EXACT)
    assert not torch.allclose(given[0], torch.autograd.grad(model(tokens).square().sum(), weight)[0])


def test_the_trainers_loss_is_the_cross_entropy_of_the_logits(tokens, mask):
    model = make()
    labels = torch.where(mask, tokens.roll(-1, 1), -100)
    loss = causal_lm_loss(model, {"tokens": tokens, "labels": labels, "mask": mask})
    expected = F.cross_entropy(model(tokens, mask=mask).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss.value, expected, **EXACT)
    assert loss.weight == mask.sum()


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_generation_takes_it_as_a_decoder(cell, tokens, mask):
    model, left = make(cell=cell), mask.flip(1)
    given = generate_tokens(model, tokens, max_new_tokens=5, mask=left)
    for row in range(3):
        so_far = tokens[row, left[row]][None]
        for _ in range(5):
            so_far = torch.cat([so_far, model(so_far)[:, -1:].argmax(-1)], dim=1)
        assert given[row].tolist() == so_far[0, -5:].tolist()


def test_rows_of_the_state_can_be_reordered(tokens):
    model = make()
    cache, rows = new_cache(model), torch.tensor([2, 2, 0])
    model(tokens[:, :5], cache=cache)
    for layer_cache in cache:
        layer_cache.reorder(rows)
    mixed = torch.cat([tokens[rows, :5], tokens[:, 5:]], dim=1)
    torch.testing.assert_close(model(tokens[:, 5:], cache=cache), model(mixed)[:, 5:], **EXACT)


@pytest.mark.parametrize("kind", [RecurrentLM, RecurrentEncoderDecoder])
def test_a_wide_beam_finds_the_best_of_all_continuations(kind):
    """4^3 continuations, scored in one pass each; 16 beams forget none of them."""
    model, prompt = make(kind, vocab_size=4, init_std=1.0), torch.randint(0, 4, (2, 2))
    model = model if kind is RecurrentLM else model.condition(torch.randint(0, 4, (2, 5)))
    found = beam_search(model, prompt, num_beams=16, max_new_tokens=3, length_penalty=0.0)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    scores = []
    for continuation in every:
        whole = torch.cat([prompt, continuation.expand(2, 3)], dim=1)
        log_probs = model(whole[:, :-1]).log_softmax(-1).gather(-1, whole[:, 1:, None])
        scores.append(log_probs[:, -3:].sum((1, 2)))
    best = torch.stack(scores).max(0)
    assert torch.equal(found.tokens[:, 0], every[best.indices])
    torch.testing.assert_close(found.scores[:, 0], best.values.float(), rtol=1e-5, atol=0)  # beams score in float32


def by_hand(model: RecurrentEncoderDecoder, source: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """One source (S,) and one target (T,), in loops, after Bahdanau et al. 2015, with torch's LSTM cells' formula."""

    def cell(layer, x, h, c):
        z = layer.input_proj.weight @ x + layer.input_proj.bias + layer.hidden_proj.weight @ h
        i, f, g, o = z.view(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    E, zeros = model.embed_tokens.weight, torch.zeros(12).double()
    below = [E[s] for s in source]
    for forward, backward in model.encoder.layers:
        h = c = zeros
        ahead, behind = [], []
        for x in below:
            h, c = cell(forward, x, h, c)
            ahead.append(h)
        h = c = zeros
        for x in below[::-1]:
            h, c = cell(backward, x, h, c)
            behind.insert(0, h)
        below = [torch.cat(pair) for pair in zip(ahead, behind, strict=True)]
    start = torch.tanh(model.start_proj.weight @ behind[0] + model.start_proj.bias).view(2, 12)
    states, logits, maps = [(start[0], zeros), (start[1], zeros)], [], []
    W, U, v = (p.weight for p in (model.cross_attn.q_proj, model.cross_attn.k_proj, model.cross_attn.score_proj))
    for token in tokens:
        weights = torch.stack([v[0] @ torch.tanh(W @ states[1][0] + U @ m) for m in below]).softmax(0)
        context = sum(w * m for w, m in zip(weights, below, strict=True))
        x = torch.cat([E[token], context])
        for depth, layer in enumerate(model.decoder.layers):
            states[depth] = cell(layer[0], x, *states[depth])
            x = states[depth][0]
        readout = torch.cat([x, context, E[token]])
        logits.append(model.lm_head.weight @ torch.tanh(model.out_proj.weight @ readout + model.out_proj.bias))
        maps.append(weights)
    return torch.stack(logits), torch.stack(maps)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tied", [False, True])
def test_encoder_decoder_is_the_papers_with_padding_on_either_side(side, tied, tokens, mask):
    mask = mask if side == "right" else mask.flip(1)
    model = make(RecurrentEncoderDecoder, tie_embeddings=tied, dropout=0.5)
    targets = torch.randint(0, 23, (3, 5))
    logits = model(tokens, targets, source_mask=mask)
    maps = model.train().attention_weights(tokens, targets, source_mask=mask)
    assert model.training  # and dropout was off
    model.eval()
    memory = model.encode(tokens, mask)
    torch.testing.assert_close(model(None, targets, memory=memory, source_mask=mask), logits, **EXACT)
    for row in range(3):
        expected, weights = by_hand(model, tokens[row, mask[row]], targets[row])
        torch.testing.assert_close(logits[row], expected, **EXACT)
        torch.testing.assert_close(maps[row][:, mask[row]], weights, **EXACT)
        assert not maps[row][:, ~mask[row]].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_the_target_changes_nothing(side, tokens, mask):
    model, mask = make(RecurrentEncoderDecoder), mask if side == "right" else mask.flip(1)
    source = torch.randint(0, 23, (3, 4))
    y = model(source, tokens, mask=mask)
    for row in range(3):
        alone = model(source[row : row + 1], tokens[row, mask[row]][None])[0]
        torch.testing.assert_close(y[row, mask[row]], alone, **EXACT)


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_encoder_decoder_generates_from_carried_state_what_one_pass_would(cell, tokens, mask):
    model = make(RecurrentEncoderDecoder, cell=cell)
    given = generate_tokens(model.condition(tokens, mask), torch.zeros(3, 1, dtype=torch.long), max_new_tokens=6)
    so_far = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(6):
        so_far = torch.cat([so_far, model(tokens, so_far, source_mask=mask)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(given, so_far[:, 1:])
    cache = new_cache(model)
    steps = [model(tokens, part, source_mask=mask, cache=cache) for part in so_far.split([1, 2, 4], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens, so_far, source_mask=mask), **EXACT)


def fit(model: nn.Module, loss, steps: int, lr: float) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return value.item()


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_language_model_learns_eight_rows_by_heart(cell):
    model = RecurrentLM(RecurrentConfig(vocab_size=23, hidden_size=48, cell=cell))
    rows = torch.randint(0, 23, (8, 13))
    rows[:, 0] = torch.arange(8)  # the first token says which row it is, so every later one can be known
    batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
    assert fit(model, lambda: causal_lm_loss(model, batch).value, 70, 0.02) < 0.05
    assert torch.equal(generate_tokens(model, rows[:, :1], max_new_tokens=12), rows[:, 1:])


def test_the_trainer_trains_it_with_truncated_backpropagation(tmp_path):
    texts = [f"{n} times {n} is {n * n}. " for n in range(40)]
    write_tokens([Document(str(n), text) for n, text in enumerate(texts)], ByteTokenizer(), tmp_path / "data")
    loader = PackedLoader(TokenFile.open(tmp_path / "data"), 4, 24)
    model = RecurrentLM(RecurrentConfig(vocab_size=259, hidden_size=24, truncate=8))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = []

    def loss_fn(model, batch):
        loss = causal_lm_loss(model, batch)
        losses.append(loss.value.item())
        return loss

    Trainer(model, loss_fn, loader, TrainConfig(steps=30, lr=0.02, device="cpu"), tmp_path / "run").fit()
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_encoder_decoder_learns_to_reverse_eight_rows(cell):
    model = RecurrentEncoderDecoder(RecurrentConfig(vocab_size=11, hidden_size=32, cell=cell))
    source, mask = torch.randint(1, 11, (8, 6)), torch.arange(6) < torch.tensor([6, 5, 4, 6, 3, 6, 5, 4])[:, None]
    target = torch.where(mask, source, 0)
    for row, length in zip(target, mask.sum(1), strict=True):
        row[:length] = row[:length].flip(0)
    inputs, labels = F.pad(target[:, :-1], (1, 0)), target.masked_fill(~mask, -100)

    batch = {"source": source, "source_mask": mask, "tokens": inputs, "labels": labels}
    logits = model(source, inputs, source_mask=mask)
    torch.testing.assert_close(
        seq2seq_loss(model, batch).value, F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    )
    assert fit(model, lambda: seq2seq_loss(model, batch).value, 60, 0.02) < 0.05
    start = torch.zeros(8, 1, dtype=torch.long)
    given = generate_tokens(model.condition(source, mask), start, max_new_tokens=6)
    assert torch.equal(given[mask], target[mask])


BAD = {
    "give either tokens or embeds": dict(embeds=torch.zeros(3, 9, 8).double()),
    r"mask has shape \(3, 8\): need \(3, 9\)": dict(mask=torch.ones(3, 8, dtype=torch.bool)),
    r"\(3, 9, 9\): .* isolate_documents=False": dict(mask=torch.ones(3, 9, 9, dtype=torch.bool)),
    r"rows \[0, 1, 2\] have no real token": dict(mask=torch.zeros(3, 9, dtype=torch.bool)),
    "mask is torch.int64: need torch.bool": dict(mask=torch.ones(3, 9, dtype=torch.long)),
    r"positions do not count": dict(positions=torch.arange(9) % 4),
    r"2 plain KVCaches, one per layer, without a prefix; got 1: KVCache": dict(cache=[KVCache()]),
    r"got 2: StaticKVCache, StaticKVCache": dict(cache=[StaticKVCache(3, 1, 9, 4) for _ in range(2)]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message, tokens, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # in tests it would refuse some before
    with pytest.raises(ValueError, match=message):
        make()(tokens, **BAD[message])


def test_positions_that_count_real_tokens_are_welcome(tokens, mask):
    model, left = make(), mask.flip(1)
    counted = (left.long().cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(tokens, mask=left, positions=counted), model(tokens, mask=left), **EXACT)
    torch.testing.assert_close(model(tokens, positions=torch.arange(9)), model(tokens), **EXACT)


def test_bad_input_of_the_encoder_decoder_is_named(tokens, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = make(RecurrentEncoderDecoder)
    memory, holes = model.encode(tokens), torch.ones(3, 9, dtype=torch.bool)
    holes[1, 4] = False
    with pytest.raises(ValueError, match="give either source or memory"):
        model(tokens, tokens, memory=memory)
    with pytest.raises(ValueError, match="give either source or memory"):
        model(None, tokens)
    with pytest.raises(ValueError, match=r"rows \[1\] have padding between"):
        model(tokens, tokens, source_mask=holes)
    with pytest.raises(ValueError, match=r"source_mask does not fit .*rows \[1\] have padding between"):
        model(None, tokens, memory=memory, source_mask=holes)
    with pytest.raises(ValueError, match=r"source_mask does not fit .*\(3, 9, 24\): mask has shape \(3, 4\)"):
        model(None, tokens, memory=memory, source_mask=holes[:, :4])
    with pytest.raises(ValueError, match="the source has 3 rows and the target 2"):
        model(tokens, tokens[:2])
    with pytest.raises(ValueError, match="truncate=4 is for a language model"):
        make(RecurrentEncoderDecoder, truncate=4)


def test_a_config_that_cannot_be_lists_everything(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError) as error:
        RecurrentConfig(
            vocab_size=0, hidden_size=-1, cell="gru", activation="tahn", dropout=1.0, truncate=0, decoder_start_id=7
        )
    lines = str(error.value).splitlines()[1:]
    words = (
        "vocab_size=0",
        "hidden_size=-1",
        "truncate=0",
        "cell='gru'",
        "did you mean tanh",
        "dropout=1.0",
        "start_id=7",
    )
    assert [word for word, line in zip(words, lines, strict=True) if word not in line] == []
    with pytest.raises(ValueError, match="activation='relu' is for cell='rnn'"):
        RecurrentConfig(activation="relu")
