"""Each kind of model learns its own task: eight examples by heart, from about chance to a loss near nothing."""

import pytest
import torch
import torch.nn.functional as F

from minillm.layers import KVCache
from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.ops import RopeScaling

N, T, V, MASK = 8, 6, 16, 15  # examples, their length, the vocabulary, the token that hides another
SIZES = dict(vocab_size=V, hidden_size=32, num_layers=1, num_heads=2, max_positions=16, init_std=0.2)
LLAMA = dict(num_kv_heads=1, tie_embeddings=False)
GPT2 = dict(positions="learned", norm="layer", mlp="plain", activation="gelu_tanh", attention_bias=True, mlp_bias=True)
BERT = GPT2 | dict(kind="encoder", norm_first=False, activation="gelu", embed_norm=True, token_types=2)
T5 = dict(kind="encoder_decoder", positions="relative", activation="gelu_tanh", tie_embeddings=False)
BART = GPT2 | dict(kind="encoder_decoder", norm_first=False, activation="gelu", embed_norm=True)
ORIGINAL = BART | dict(positions="sinusoidal", activation="relu", embed_norm=False)


def learn(model, loss_of, *, lr: float = 3e-3, steps: int = 60) -> tuple[float, float]:
    """The loss before and after plain full-batch training."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss_of())
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), losses[-1].item()


def texts(*shape: int) -> torch.Tensor:
    """Random tokens, none of them 0 or the mask; the first one numbers the text."""
    tokens = torch.randint(1, MASK, shape)
    tokens[..., 0] = torch.arange(1, N + 1).view(-1, *[1] * (len(shape) - 2))
    return tokens


def lengths_mask() -> torch.Tensor:
    return torch.arange(T) < torch.tensor([6, 5, 4, 3, 6, 5, 4, 3])[:, None]


@pytest.mark.parametrize(
    "fields",
    [
        LLAMA,
        LLAMA | dict(sliding_window=3, qk_norm=True, rope_scaling=RopeScaling("llama3", 2.0, 1.0, 4.0, 8)),
        GPT2,
        dict(positions="relative"),
    ],
    ids=["llama", "llama with its later parts", "gpt2", "relative"],
)
def test_a_decoder_learns_texts(fields):
    model, tokens = build(ModelConfig(**SIZES | fields)), texts(N, T)
    before, after = learn(model, lambda: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
    assert before > 2.0 and after < 0.05


def test_an_encoder_learns_hidden_words():
    model, tokens = build_with_head(ModelConfig(**SIZES | BERT), HeadConfig("masked_lm")), texts(N, T)
    hidden = torch.zeros(N, T, dtype=torch.bool)
    hidden[:, 3:5] = True
    inputs = tokens.masked_fill(hidden, MASK)
    before, after = learn(model, lambda: F.cross_entropy(model(inputs)[hidden], tokens[hidden]))
    assert before > 2.0 and after < 0.05


@pytest.mark.parametrize("fields", [T5, BART, ORIGINAL], ids=["t5", "bart", "2017"])
def test_an_encoder_decoder_learns_to_copy(fields):
    """And says the copies when it writes one token at a time."""
    model, source, mask = build(ModelConfig(**SIZES | fields)), texts(N, T), lengths_mask()
    inputs = torch.cat([torch.zeros(N, 1, dtype=torch.long), source[:, :-1]], 1)
    before, after = learn(model, lambda: F.cross_entropy(model(source, inputs, source_mask=mask)[mask], source[mask]))
    assert before > 2.0 and after < 0.05
    conditioned, cache, written = model.eval().condition(source, mask), [KVCache() for _ in model.layers], inputs[:, :1]
    for _ in range(T):
        written = torch.cat([written, conditioned(written[:, -1:], cache=cache)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written[:, 1:][mask], source[mask])


BODIES = {"encoder": BERT, "decoder": LLAMA, "encoder_decoder": BART}


def headed(task: str, kind: str = "encoder", **fields):
    fields = dict(dropout=0.0, pool="last" if kind == "decoder" else "first") | fields
    return build_with_head(ModelConfig(**SIZES | BODIES[kind]), HeadConfig(task, **fields))


@pytest.mark.parametrize(
    "kind, task",
    [(kind, "classification") for kind in BODIES] + [("encoder", "multi_label"), ("encoder", "regression")],
)
def test_texts_learn_their_labels(kind, task):
    """Texts begin alike, so that a first state without what it read could not tell them apart."""
    model, tokens, mask = headed(task, kind, num_labels=3), torch.randint(1, MASK, (N, T)), lengths_mask()
    tokens[:, 0] = 1
    labels = torch.arange(N) % 3
    loss, target = {
        "classification": (F.cross_entropy, labels),
        "multi_label": (F.binary_cross_entropy_with_logits, torch.randint(0, 2, (N, 3)).float()),
        "regression": (F.mse_loss, torch.randn(N, 3)),
    }[task]
    before, after = learn(model, lambda: loss(model(tokens, mask=mask), target))
    assert before > 0.4 and after < 0.05


def test_tokens_learn_their_tags():
    """A token's tag is the parity of its own number and of the one before."""
    model, tokens, mask = headed("tagging", num_labels=4), texts(N, T), lengths_mask()
    before = torch.cat([torch.zeros(N, 1, dtype=torch.long), tokens[:, :-1]], 1)
    tags = 2 * (before % 2) + tokens % 2
    first, last = learn(model, lambda: F.cross_entropy(model(tokens, mask=mask)[mask], tags[mask]))
    assert first > 1.0 and last < 0.05


def test_spans_are_found():
    """The answer is what stands between two marks."""
    model, tokens, mask = headed("span"), torch.randint(2, MASK, (N, T)), lengths_mask()
    start, end = torch.arange(N) % 2, 2 + torch.arange(N) % 2
    end = torch.minimum(end, mask.sum(1) - 1)
    rows = torch.arange(N)
    tokens[rows, start] = tokens[rows, end] = 1

    def loss():
        scores = model(tokens, mask=mask)
        return F.cross_entropy(scores[..., 0], start) + F.cross_entropy(scores[..., 1], end)

    before, after = learn(model, loss)
    assert before > 2.0 and after < 0.05


def test_the_right_choice_is_learned():
    model, tokens, right = headed("choice"), torch.randint(1, MASK, (N, 3, T)), torch.arange(N) % 3
    mask = lengths_mask()[:, None].expand(-1, 3, -1)
    before, after = learn(model, lambda: F.cross_entropy(model(tokens, mask=mask), right))
    assert before > 0.9 and after < 0.05


def test_sentences_that_belong_together_come_together():
    """Each text and its partner, among all partners, by cosine at temperature 0.05 (Gao et al. 2021, SimCSE)."""
    model = headed("embedding", pool="mean", dense=None)
    texts_of = [torch.randint(1, MASK, (N, T)) for _ in range(2)]
    mask = lengths_mask()

    def loss():
        one, other = (F.normalize(model(tokens, mask=mask), dim=-1) for tokens in texts_of)
        return F.cross_entropy(one @ other.T / 0.05, torch.arange(N))

    before, after = learn(model, loss)
    assert before > 1.0 and after < 0.05
