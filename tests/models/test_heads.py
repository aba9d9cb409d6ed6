"""Each head by hand from its body's hidden states; what a text is does not depend on what stands around it."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import pad

from minillm.models import (
    HEADS,
    Classifier,
    HeadConfig,
    MaskedLM,
    ModelConfig,
    MultipleChoice,
    SentenceEmbedder,
    SpanExtractor,
    Tagger,
    build_with_head,
)

V, D = 23, 12
KINDS = ["encoder", "decoder", "encoder_decoder"]
SAME = dict(rtol=0, atol=1e-12)  # float64


def make(task: str, kind: str = "encoder", body: dict | None = None, **fields):
    sizes = dict(vocab_size=V, hidden_size=D, num_layers=2, num_heads=2, intermediate_size=20, max_positions=16)
    if kind == "decoder" and task != "masked_lm":
        fields = dict(pool="last") | fields
    model = build_with_head(ModelConfig(**sizes | dict(kind=kind) | (body or {})), HeadConfig(task=task, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(parameter.dim() == 1)
    return model.double().eval()


def states(model, tokens, mask=None):
    """The body's hidden states; an encoder-decoder reads the text twice, the second time moved right by one."""
    if model.config.kind != "encoder_decoder":
        return model.body.hidden(tokens, mask=mask)
    start = torch.full((len(tokens), 1), model.config.decoder_start_id)
    return model.body.hidden(tokens, torch.cat([start, tokens[:, :-1]], 1), source_mask=mask)


@pytest.fixture
def tokens():
    return torch.randint(0, V, (3, 6))


RIGHT = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, None: None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dense", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
def test_classifier_by_hand(tokens, kind, dense, bias, task):
    model = make(task, kind, num_labels=4, pool="last", dense=dense, bias=bias)
    x = states(model, tokens, RIGHT)[torch.arange(3), torch.tensor([5, 3, 0])]
    if dense:
        x = ACTIVATIONS[dense](x @ model.pooler.dense.weight.T + model.pooler.dense.bias)
    x = x @ model.classifier.weight.T + (model.classifier.bias if bias else 0)
    assert isinstance(model, Classifier) and (model.classifier.bias is None) == (not bias)
    torch.testing.assert_close(model(tokens, mask=RIGHT), x, **SAME)


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
@pytest.mark.parametrize("batch", [[6, 4, 1], [3], [6]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_is_over_real_tokens(pool, batch, side):
    model = make("embedding", pool=pool, dense=None)
    mask = torch.arange(6) < torch.tensor(batch)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    tokens = torch.randint(0, V, mask.shape)
    hidden, expected = model.body(tokens, mask=mask), []
    for row, real in zip(hidden, mask, strict=True):
        text = row[real]
        expected.append({"first": text[0], "last": text[-1], "mean": sum(text) / len(text)}[pool])
    torch.testing.assert_close(model(tokens, mask=mask), torch.stack(expected), **SAME)
    everything = {"first": hidden[:, 0], "last": hidden[:, -1], "mean": hidden.mean(1)}[pool]
    torch.testing.assert_close(model.pooler(hidden), everything, **SAME)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["rope", "learned", "relative"])
@pytest.mark.parametrize("left, right", [(3, 0), (0, 3), (2, 1)])
def test_an_answer_does_not_depend_on_padding(tokens, kind, positions, left, right):
    padded, mask = pad(tokens, (left, right), value=7), pad(torch.ones(3, 6, dtype=torch.bool), (left, right))
    for pool in ("last", "mean", "first")[: 2 if kind == "decoder" else 3]:  # a decoder's first state is refused
        model = make("classification", kind, dict(positions=positions), pool=pool)
        torch.testing.assert_close(model(padded, mask=mask), model(tokens), **SAME)
    tagger = make("tagging", kind, dict(positions=positions))
    torch.testing.assert_close(tagger(padded, mask=mask)[:, left : left + 6], tagger(tokens), **SAME)


def test_tagger_by_hand(tokens):
    model = make("tagging", num_labels=5)
    expected = model.body(tokens, mask=RIGHT) @ model.classifier.weight.T + model.classifier.bias
    assert isinstance(model, Tagger)
    torch.testing.assert_close(model(tokens, mask=RIGHT), expected, **SAME)


@pytest.mark.parametrize("side", ["left", "right"])
def test_span_extractor_by_hand_and_never_on_padding(tokens, side):
    model = make("span")
    mask = RIGHT if side == "right" else RIGHT.flip(1)
    expected = model.body(tokens, mask=mask) @ model.outputs.weight.T + model.outputs.bias
    given = model(tokens, mask=mask)
    assert isinstance(model, SpanExtractor)
    torch.testing.assert_close(given[mask], expected[mask], **SAME)
    assert (given[~mask] == -torch.inf).all()
    assert (given.softmax(1)[~mask] == 0).all()
    assert mask.gather(1, given.argmax(1)).all()
    assert model(tokens).isfinite().all()
    start = F.cross_entropy(model(tokens, mask=mask)[..., 0], mask.long().argmax(1))
    start.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_multiple_choice_is_each_choice_alone(pool):
    model = make("choice", body=dict(token_types=2), pool=pool)
    tokens, types = torch.randint(0, V, (2, 4, 6)), torch.randint(0, 2, (2, 4, 6))
    mask = torch.arange(6) < torch.randint(1, 7, (2, 4, 1))
    given = model(tokens, mask=mask, token_types=types)
    assert isinstance(model, MultipleChoice) and given.shape == (2, 4)
    for b in range(2):
        for c in range(4):
            text = mask[b, c]
            hidden = model.body(tokens[b, c][text][None], token_types=types[b, c][text][None])
            score = model.classifier(model.pooler(hidden))
            torch.testing.assert_close(given[b, c], score[0, 0], **SAME)
    torch.testing.assert_close(model(tokens)[1], model(tokens[1:])[0], **SAME)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_masked_lm_by_hand(tokens, tied, norm):
    body = dict(tie_embeddings=tied, norm=norm, mlp="plain", activation="gelu")
    model = make("masked_lm", body=body)
    x = F.gelu(model.body(tokens, mask=RIGHT) @ model.dense.weight.T + model.dense.bias)
    if norm == "layer":
        x = F.layer_norm(x, (D,), model.norm.weight, model.norm.bias, model.config.norm_eps)
    else:
        x = F.rms_norm(x, (D,), model.norm.weight, model.config.norm_eps)
    assert isinstance(model, MaskedLM)
    torch.testing.assert_close(model.hidden(tokens, mask=RIGHT), x, **SAME)
    matrix = model.embed_tokens.weight if tied else model.lm_head.weight
    torch.testing.assert_close(model(tokens, mask=RIGHT), x @ matrix.T + model.lm_head.bias, **SAME)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(V, D).double())
    model.tie_weights()
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_every_parameter_serves(tokens, kind, task, pool):
    """A gradient reaches every parameter, and no LM head lies there unused."""
    extra = dict(token_types=2, embed_norm=True) if kind == "encoder" else {}
    model = make(task, kind, dict(positions="relative", qk_norm=True, tie_embeddings=False) | extra, pool=pool)
    inputs = tokens[:, None].repeat(1, 2, 1) if task == "choice" else tokens
    mask = RIGHT[:, None].repeat(1, 2, 1) if task == "choice" else RIGHT
    scores = model(inputs, mask=mask)
    scores[scores.isfinite()].sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert not [name for name, _ in model.named_parameters() if name.startswith("body") and "lm_head" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_passes_on_what_its_body_is(tokens, kind):
    model = make("classification", kind)
    model.tokenizer_fingerprint, model.gradient_checkpointing = "abc", True
    assert model.body.tokenizer_fingerprint == model.tokenizer_fingerprint == "abc"
    assert model.body.gradient_checkpointing and model.gradient_checkpointing
    assert model.embed_tokens is model.body.embed_tokens and model.layers is model.body.layers
    assert model.config is model.body.config
    if kind != "encoder_decoder":
        given = model(embeds=model.embed_tokens(tokens), mask=RIGHT)
        torch.testing.assert_close(given, model(tokens, mask=RIGHT), **SAME)


@pytest.mark.parametrize("task", ["classification", "tagging", "choice"])
def test_dropout_is_before_the_answer_and_for_training(tokens, task):
    model = make(task, dropout=0.5)
    inputs = tokens[:, None] if task == "choice" else tokens
    assert torch.equal(model(inputs), model(inputs))
    read = []
    model.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    expected = model(inputs)
    model.train()(inputs)
    dropped = read[1] == 0
    assert 0 < dropped.sum() < dropped.numel()
    torch.testing.assert_close(read[1][~dropped], 2 * read[0][~dropped], **SAME)
    assert not torch.equal(model(inputs), expected)


def test_a_new_head_starts_small_and_without_bias():
    config = ModelConfig(kind="encoder", vocab_size=V, hidden_size=64, num_layers=1, num_heads=2, init_std=0.1)
    for task, layers in (
        ("classification", ["pooler.dense", "classifier"]),
        ("tagging", ["classifier"]),
        ("span", ["outputs"]),
        ("choice", ["pooler.dense", "classifier"]),
        ("embedding", ["pooler.dense"]),
        ("masked_lm", ["dense", "lm_head"]),
    ):
        model = build_with_head(config, HeadConfig(task=task, num_labels=30))
        for name in layers:
            layer = model.get_submodule(name)
            error = 5 * 0.1 / (2 * layer.weight.numel()) ** 0.5  # five standard errors of a standard deviation
            assert layer.weight.std().item() == pytest.approx(0.1, abs=error), (task, name)
            assert not layer.bias.any()


def test_a_sentence_is_a_vector_and_nothing_more():
    model = make("embedding", dense=None, pool="mean")
    assert isinstance(model, SentenceEmbedder)
    assert [name for name, _ in model.named_parameters() if not name.startswith("body.")] == []


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(task="clasification"), "task='clasification': did you mean classification"),
        (dict(pool="max"), "pool='max': did you mean one of first, last, mean"),
        (dict(dense="tan"), "dense='tan': did you mean tanh"),
        (dict(num_labels=0), "num_labels=0: must be at least 1"),
        (dict(dropout=1.0), r"dropout=1.0: must be in \[0, 1\)"),
        (dict(dropout=float("nan")), r"dropout=nan: must be in \[0, 1\)"),
        (dict(pool="lst", num_labels=-1), "(?s)cannot be built.*pool='lst': did you mean last.*num_labels=-1"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(fields, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # in tests it would refuse some before
    with pytest.raises(ValueError, match=message):
        HeadConfig(**fields)


def test_a_head_that_its_body_cannot_serve_is_refused(tokens):
    for task in ("classification", "choice", "embedding"):
        with pytest.raises(ValueError, match="a decoder's first state has read only the first token; take 'last' or"):
            make(task, "decoder", pool="first")
    with pytest.raises(ValueError, match="an encoder-decoder a head reads tokens, on both sides"):
        make("classification", "encoder_decoder")(embeds=torch.zeros(1, 2, D).double())
