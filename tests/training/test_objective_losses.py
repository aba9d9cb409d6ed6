"""Losses against torch.nn.functional in float64, gradients included, on small stand-ins for models and on our own."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.data import (
    Document,
    MaskedLanguageModeling,
    MixedLoader,
    ObjectiveLoader,
    SpanCorruption,
    TextInfilling,
    sampling_probabilities,
    sentence_groups,
    write_tokens,
)
from minillm.models import ModelConfig, build
from minillm.models.heads import HeadConfig, build_with_head
from minillm.tokenizers import ByteTokenizer
from minillm.training import (
    DistillationLoss,
    Loss,
    TrainConfig,
    Trainer,
    causal_lm_loss,
    choice_loss,
    classification_loss,
    contrastive_loss,
    masked_lm_loss,
    multi_label_loss,
    regression_loss,
    seq2seq_loss,
    span_loss,
    tagging_loss,
)

V, D = 31, 8


class Body(nn.Module):
    """Hidden states of tokens, and of a source if one is given, that depend on everything it is told."""

    def __init__(self, head: nn.Module | None = None, dropout=0.0):
        super().__init__()
        self.embed_tokens, self.up_proj = nn.Embedding(V, D), nn.Linear(D, D)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = head or nn.Linear(D, V)
        self.double()

    def hidden(self, *inputs, source_mask=None, mask=None, token_types=None, positions=None):
        *source, tokens = inputs
        x = self.embed_tokens(tokens)
        for said, size in ((mask, 0.5), (token_types, 0.3), (positions, 0.1)):
            if said is not None:
                x = x + size * said[..., None]
        for s in source:
            x = x + (self.embed_tokens(s) * source_mask[..., None]).sum(1, keepdim=True)
        return torch.tanh(self.up_proj(self.dropout(x)))

    def forward(self, *inputs, **named):
        return self.lm_head(self.hidden(*inputs, **named))


class Scores(nn.Module):
    """Gives what it was made with: a head whose scores are parameters."""

    def __init__(self, *shape):
        super().__init__()
        self.scores = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, tokens, mask=None):
        return self.scores


class Embedder(nn.Module):
    """The mean over real tokens of their vectors, (B, D)."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = Body(nn.Identity(), dropout)

    def forward(self, tokens, mask=None):
        weights = torch.ones(tokens.shape) if mask is None else mask
        return (self.body(tokens) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


class Same:
    """A loader that gives one batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        return self

    def __next__(self):
        return self.batch

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """There is nowhere to go to."""


class Scaled(nn.Module):
    """A head that is not a plain nn.Linear."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(D, V)

    def forward(self, x):
        return 2 * self.base(x) - 0.3


def equal(loss, expected, model, weight=None):
    """Value and gradients in float64."""
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-14)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, right = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss.value, expected))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(
            *(torch.zeros(()) if x is None or not x.any() else x for x in (a, b)), rtol=1e-9, atol=1e-13
        )
    if weight is not None:
        assert loss.weight == weight


def token_batch(rows=6, length=50, source=False):
    """Some -100; more than 256 labels in all, so that a head is called for several chunks."""
    labels = torch.randint(V, (rows, length))
    labels[torch.rand(rows, length) < 0.1] = -100
    batch = {"tokens": torch.randint(V, (rows, length)), "labels": labels, "mask": torch.rand(rows, length) < 0.8}
    if source:
        batch |= {"source": torch.randint(V, (rows, 7)), "source_mask": torch.rand(rows, 7) < 0.7}
    return batch


def halves(batch, at):
    return [{name: values[part] for name, values in batch.items()} for part in (slice(at), slice(at, None))]


def join(losses):
    """The mean over unequal batches, as the trainer takes it."""
    total = sum(float(loss.weight) for loss in losses)
    mean = sum(loss.value * loss.weight for loss in losses) / total
    return (
        mean,
        total,
        {name: sum(loss.metrics[name] * loss.weight for loss in losses) / total for name in losses[0].metrics},
    )


# --- language models


@pytest.mark.parametrize("head", [None, Scaled], ids=["linear", "wrapped"])
@pytest.mark.parametrize("loss_fn", [causal_lm_loss, masked_lm_loss])
def test_token_losses_are_cross_entropy(loss_fn, head):
    model = Body(head and head())
    batch = token_batch() | {"positions": torch.randint(9, (6, 50)), "token_types": torch.randint(2, (6, 50))}
    named = {name: batch[name] for name in ("mask", "positions", "token_types")}
    logits = model(batch["tokens"], **named)
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    equal(loss_fn(model, batch), expected, model, (batch["labels"] != -100).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(
    "head", [None, Scaled, lambda: nn.Linear(D, V, bias=False)], ids=["linear", "wrapped", "plain"]
)
def test_seq2seq_loss_is_smoothed_cross_entropy(smoothing, head):
    model, batch = Body(head and head()), token_batch(source=True)
    logits = model(batch["source"], batch["tokens"], source_mask=batch["source_mask"], mask=batch["mask"])
    arguments = logits.flatten(0, 1), batch["labels"].flatten()
    found = seq2seq_loss(model, batch, label_smoothing=smoothing)
    equal(found, F.cross_entropy(*arguments, label_smoothing=smoothing), model, (batch["labels"] != -100).sum())
    if smoothing:
        torch.testing.assert_close(found.metrics["nll"], F.cross_entropy(*arguments).detach(), rtol=1e-12, atol=0)
        assert not found.metrics["nll"].requires_grad
    else:
        assert found.metrics == {}


def test_smoothing_looks_at_no_state_without_a_label():
    """A broken state at an ignored place changes neither the loss nor any gradient."""
    model, batch = Body(), token_batch(source=True)
    broken = copy.deepcopy(model)
    hidden = broken.hidden
    ignored = batch["labels"] == -100
    broken.hidden = lambda *inputs, **named: hidden(*inputs, **named).masked_fill(ignored[..., None], torch.nan)
    losses = [seq2seq_loss(m, batch, label_smoothing=0.1).value for m in (model, broken)]
    gradients = [torch.autograd.grad(losses[i], list(m.lm_head.parameters())) for i, m in enumerate((model, broken))]
    assert losses[0] == losses[1]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_our_models_fit(kind):
    """Masked LM on each body, seq2seq on the encoder-decoder, against their own logits."""
    config = ModelConfig(vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, max_positions=64, kind=kind)
    batch = token_batch(source=kind == "encoder_decoder")
    batch["mask"][:, 0] = batch.get("source_mask", batch["mask"])[:, 0] = True
    masked = {name: batch[name] for name in ("tokens", "labels", "mask")}
    model = build_with_head(config, HeadConfig(task="masked_lm")).double().eval()
    logits = model(batch["tokens"], mask=batch["mask"])
    equal(masked_lm_loss(model, masked), F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), model)
    if kind == "encoder_decoder":
        model = build(config).double().eval()
        logits = model(batch["source"], batch["tokens"], source_mask=batch["source_mask"], mask=batch["mask"])
        expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
        equal(seq2seq_loss(model, batch, label_smoothing=0.1), expected, model)


# --- labels


def test_classification_loss():
    model, labels = Scores(9, 4), torch.tensor([0, 3, -100, 1, 1, 2, -100, 3, 0])
    found = classification_loss(model, {"tokens": labels, "labels": labels})
    equal(found, F.cross_entropy(model.scores, labels), model, 7)
    right = [int(row.argmax()) == label for row, label in zip(model.scores, labels.tolist(), strict=True) if label >= 0]
    assert found.metrics["accuracy"] == pytest.approx(sum(right) / 7)


def test_choice_loss():
    model, labels = Scores(5, 3), torch.tensor([0, 2, 1, -100, 2])
    found = choice_loss(model, {"tokens": torch.zeros(5, 3, 7), "labels": labels})
    equal(found, F.cross_entropy(model.scores, labels), model, 4)


def test_tagging_loss():
    model, labels = Scores(3, 6, 5), torch.randint(5, (3, 6))
    labels[:, 0] = labels[1, 3:] = -100
    found = tagging_loss(model, {"tokens": labels, "labels": labels})
    equal(found, F.cross_entropy(model.scores.flatten(0, 1), labels.flatten()), model, 12)
    right = (model.scores.argmax(-1) == labels).sum() / 12
    torch.testing.assert_close(found.metrics["accuracy"], right)


def test_span_loss():
    """The mean of the start's and the end's losses, as for the question-answering heads of transformers."""
    model, labels = Scores(6, 7, 2), torch.tensor([[0, 6], [2, 2], [-100, -100], [7, 9], [3, 5], [-1, -1]])
    found = span_loss(model, {"tokens": torch.zeros(6, 7), "labels": labels})
    counted = [0, 1, 4]  # outside are -100, -1, and what was cut off at the end
    start, end = (F.cross_entropy(model.scores[counted, :, i], labels[counted, i]) for i in range(2))
    equal(found, (start + end) / 2, model, 6)
    best = model.scores[counted].argmax(1)
    torch.testing.assert_close(found.metrics["accuracy"], (best == labels[counted]).sum() / 6)


def test_span_loss_counts_a_start_without_its_end():
    model, labels = Scores(2, 7, 2), torch.tensor([[5, 8], [1, 3]])
    found = span_loss(model, {"tokens": torch.zeros(2, 7), "labels": labels})
    starts = F.cross_entropy(model.scores[..., 0], labels[:, 0], reduction="sum")
    equal(found, (starts + F.cross_entropy(model.scores[1:, :, 1], labels[1:, 1])) / 3, model, 3)


def test_span_loss_agrees_with_transformers():
    from transformers import BertConfig, BertForQuestionAnswering

    config = BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = BertForQuestionAnswering(config).eval().double()
    tokens, labels = torch.randint(1, V, (5, 9)), torch.tensor([[1, 3], [0, 8], [9, 9], [4, 4], [12, 20]])

    class Extractor(nn.Module):
        def forward(self, tokens):
            out = theirs(tokens)
            return torch.stack([out.start_logits, out.end_logits], -1)

    expected = theirs(tokens, start_positions=labels[:, 0].clone(), end_positions=labels[:, 1].clone()).loss
    torch.testing.assert_close(span_loss(Extractor(), {"tokens": tokens, "labels": labels}).value, expected)


def test_multi_label_loss():
    model, labels = Scores(4, 3), torch.tensor([[0, 1, 1], [1, 0, -100], [0.25, 0, 0], [-100, -100, 1]]).double()
    found = multi_label_loss(model, {"tokens": labels, "labels": labels})
    known = labels != -100
    expected = F.binary_cross_entropy_with_logits(model.scores[known], labels[known])
    equal(found, expected, model, 9)
    right = ((model.scores[known] > 0) == (labels[known] > 0.5)).sum() / 9
    torch.testing.assert_close(found.metrics["accuracy"], right)


@pytest.mark.parametrize("outputs, labels", [((6, 1), (6,)), ((6,), (6,)), ((4, 3), (4, 3))])
def test_regression_loss(outputs, labels):
    model, labels = Scores(*outputs), torch.randn(labels, dtype=torch.float64) * 50
    labels.view(-1)[0] = -100  # a temperature, say
    found = regression_loss(model, {"tokens": labels, "labels": labels})
    expected = F.mse_loss(model.scores.view(labels.shape), labels)
    equal(found, expected, model, labels.numel())
    torch.testing.assert_close(
        found.metrics["absolute_error"], F.l1_loss(model.scores.view(labels.shape), labels).detach()
    )


def test_half_precision_is_summed_in_float32():
    scores = torch.randn(64, 40).bfloat16()
    labels = torch.randint(40, (64,))
    found = classification_loss(lambda tokens: scores, {"tokens": labels, "labels": labels}).value
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(scores.float(), labels))


# --- joined and empty batches

HEADS = {
    "classification": (
        classification_loss,
        HeadConfig(task="classification", num_labels=3),
        lambda: torch.randint(3, (6,)),
    ),
    "tagging": (tagging_loss, HeadConfig(task="tagging", num_labels=3), lambda: torch.randint(3, (6, 9))),
    "span": (span_loss, HeadConfig(task="span"), lambda: torch.randint(9, (6, 2))),
    "multi_label": (multi_label_loss, HeadConfig(task="multi_label", num_labels=3), lambda: torch.rand(6, 3).round()),
    "regression": (regression_loss, HeadConfig(task="regression", num_labels=1), lambda: torch.randn(6)),
    "choice": (choice_loss, HeadConfig(task="choice"), lambda: torch.randint(4, (6,))),
    "masked_lm": (masked_lm_loss, HeadConfig(task="masked_lm"), lambda: torch.randint(V, (6, 9))),
}


@pytest.fixture(params=HEADS)
def task(request):
    """(loss function, our model with that head on an encoder, a batch of 6 with some labels that do not count)."""
    loss_fn, head, labels = HEADS[request.param]
    config = ModelConfig(vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, max_positions=64, kind="encoder")
    shape = (6, 4, 9) if request.param == "choice" else (6, 9)
    batch = {"tokens": torch.randint(V, shape), "mask": torch.ones(shape, dtype=torch.bool), "labels": labels()}
    if request.param != "regression":
        batch["labels"][1] = -100
    return loss_fn, build_with_head(config, head).double().eval(), batch


def test_two_parts_weighted_are_the_whole(task):
    loss_fn, model, batch = task
    whole, parts = loss_fn(model, batch), [loss_fn(model, part) for part in halves(batch, 2)]
    mean, weight, metrics = join(parts)
    torch.testing.assert_close(mean, whole.value, rtol=1e-12, atol=0)
    assert weight == whole.weight and parts[0].weight != parts[1].weight
    assert metrics == pytest.approx({name: float(value) for name, value in whole.metrics.items()})
    assert not any(value.requires_grad for value in whole.metrics.values())
    gradients = [torch.autograd.grad(x, list(model.parameters()), allow_unused=True) for x in (mean, whole.value)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_a_batch_without_labels_is_a_zero_that_weighs_nothing(task):
    loss_fn, model, batch = task
    empty = {name: values[:0] for name, values in batch.items()} if loss_fn is regression_loss else batch
    if loss_fn is not regression_loss:
        empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    else:
        model = Scores(0, 1)
    loss = loss_fn(model, empty)
    assert (loss.value, loss.weight) == (0, 0)
    loss.value.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert all(value == 0 for value in loss.metrics.values())


def test_a_trainer_lowers_each_loss(task, tmp_path):
    loss_fn, model, batch = task

    before = loss_fn(model, batch).value.item()
    Trainer(
        model, loss_fn, Same(batch), TrainConfig(steps=5, lr=0.01, warmup_ratio=0, device="cpu"), tmp_path / "run"
    ).fit()
    assert loss_fn(model.eval(), batch).value.item() < before


# --- contrastive


def info_nce(a, b, temperature):
    """Equation 1 of SimCSE, term by term."""

    def cosine(x, y):
        return (x @ y) / (x.norm() * y.norm())

    terms = [
        -torch.log(torch.exp(cosine(a[i], b[i]) / temperature)
                   / sum(torch.exp(cosine(a[i], b[j]) / temperature) for j in range(len(b))))
        for i in range(len(a))
    ]  # fmt: skip
    return sum(terms) / len(terms)


def embed(model, groups):
    """All first, second and third sentences, each without padding."""
    return [torch.cat([model(torch.tensor([sentence])) for sentence in place]) for place in zip(*groups, strict=True)]


def test_contrastive_loss_of_pairs_and_triples():
    model = Embedder()
    groups = [([i, i + 1, 5], [i + 2] * (i + 1), [i + 3, 30]) for i in range(5)]
    batch = sentence_groups([group[:2] for group in groups], pad_id=0)
    equal(contrastive_loss(model, batch, temperature=0.1), info_nce(*embed(model, groups)[:2], 0.1), model, 5)
    batch, (a, b, c) = sentence_groups(groups, pad_id=0), embed(model, groups)
    found = contrastive_loss(model, batch)
    equal(found, info_nce(a, torch.cat([b, c]), 0.05), model, 5)
    nearest = F.cosine_similarity(a[:, None], torch.cat([b, c])[None], dim=-1).argmax(1)
    assert found.metrics["accuracy"] == (nearest == torch.arange(5)).double().mean()


def test_contrastive_loss_of_two_dropout_passes():
    model, batch = Embedder(dropout=0.3), {"tokens": torch.randint(V, (6, 5))}
    torch.manual_seed(4)
    a, b = model(batch["tokens"]), model(batch["tokens"])
    torch.manual_seed(4)
    equal(contrastive_loss(model, batch), info_nce(a, b, 0.05), model, 6)
    alike = contrastive_loss(model.eval(), batch)  # fine for measuring: how far are the others?
    assert alike.metrics["accuracy"] == 1


def test_contrastive_loss_of_our_embedder():
    config = ModelConfig(
        vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, max_positions=64, kind="encoder", dropout=0.1
    )
    model = build_with_head(config, HeadConfig(task="embedding", pool="mean", dense=None)).double()
    batch = sentence_groups([([i, i + 1], [i + 2]) for i in range(4)], pad_id=0)
    del batch["positives"], batch["positives_mask"]
    loss = contrastive_loss(model, batch)
    loss.value.backward()
    assert loss.weight == 4 and model.embed_tokens.weight.grad.any()


def test_contrastive_loss_stays_in_float32_under_autocast():
    model, batch = Embedder().float(), sentence_groups([([i], [i + 9]) for i in range(8)], pad_id=0)
    with torch.autocast("cpu", torch.bfloat16):
        found, a, b = contrastive_loss(model, batch).value, model(batch["tokens"]), model(batch["positives"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, info_nce(a.float(), b.float(), 0.05), rtol=1e-4, atol=0)


def test_wrong_contrastive_batches():
    model, two = Embedder(), {"tokens": torch.tensor([[1, 2], [3, 4]])}
    with pytest.raises(ValueError, match=r"temperature 0 must be above 0; two passes gave the same .* without dropout"):
        contrastive_loss(model, two, temperature=0)
    with pytest.raises(ValueError, match="one sentence has nothing to differ from"):
        contrastive_loss(Embedder(0.1), {"tokens": torch.tensor([[1, 2]])})
    with pytest.raises(ValueError, match="1 positives for 2 sentences"):
        contrastive_loss(model, two | {"positives": torch.tensor([[1, 2]])})
    with pytest.raises(ValueError, match="the batch has no tokens"):
        contrastive_loss(model, {})


# --- distillation


def distilled(student, teacher, batch, temperature, soft, hard, cosine):
    """Each part by torch, over the labels that count."""
    counts = batch["labels"] != -100
    inputs = [batch[name] for name in ("source", "tokens") if name in batch]
    named = {name: batch[name] for name in ("source_mask", "mask") if name in batch}
    states = [model.hidden(*inputs, **named)[counts] for model in (student, teacher)]
    mine, theirs = (model.lm_head(h) for model, h in zip((student, teacher), states, strict=True))
    target = (theirs.detach() / temperature).softmax(-1)
    parts = (
        F.kl_div((mine / temperature).log_softmax(-1), target, reduction="batchmean") * temperature**2,
        F.cross_entropy(mine, batch["labels"][counts]),
        F.cosine_embedding_loss(*states, torch.ones(len(states[0]))),
    )
    return soft * parts[0] + hard * parts[1] + cosine * parts[2], parts


@pytest.mark.parametrize("head", [None, Scaled], ids=["linear", "wrapped"])
@pytest.mark.parametrize("source", [False, True])
def test_distillation_loss_is_the_sum_of_its_parts(source, head):
    student, teacher, batch = Body(head and head()), Body(), token_batch(source=source)
    loss_fn = DistillationLoss(teacher, temperature=3.0, soft=0.7, hard=0.2, cosine=0.4)
    expected, parts = distilled(student, teacher.requires_grad_(False), batch, 3.0, 0.7, 0.2, 0.4)
    teacher.requires_grad_(True)
    found = loss_fn(student, batch)
    equal(found, expected, student, (batch["labels"] != -100).sum())
    for name, part in zip(("soft", "hard", "cosine"), parts, strict=True):
        torch.testing.assert_close(found.metrics[name], part.detach(), rtol=1e-12, atol=1e-14)


def test_distillation_parts_weighted_are_the_whole():
    student, loss_fn, batch = Body(), DistillationLoss(Body()), token_batch()
    mean, weight, metrics = join([loss_fn(student, part) for part in halves(batch, 2)])
    whole = loss_fn(student, batch)
    torch.testing.assert_close(mean, whole.value, rtol=1e-12, atol=0)
    assert weight == whole.weight
    assert metrics == pytest.approx({name: float(value) for name, value in whole.metrics.items()})
    empty = loss_fn(student, batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert (empty.value, empty.weight) == (0, 0)
    empty.value.backward()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    teacher = Body()
    found = DistillationLoss(teacher)(copy.deepcopy(teacher), token_batch())
    assert abs(found.metrics["soft"]) < 1e-12 and abs(found.metrics["cosine"]) < 1e-12 < found.metrics["hard"]


def test_the_teacher_is_in_eval_mode_and_never_trained(tmp_path):
    teacher, student = Body(dropout=0.5), Body(dropout=0.1)
    batch = token_batch()
    before = copy.deepcopy(teacher.state_dict())
    loss_fn = DistillationLoss(teacher.train())

    Trainer(
        student, loss_fn, Same(batch), TrainConfig(steps=4, lr=0.1, warmup_ratio=0, device="cpu"), tmp_path / "run"
    ).fit()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    teacher.train()
    assert loss_fn(student.eval(), batch).metrics == loss_fn(student, batch).metrics  # no dropout in the teacher


def test_wrong_distillation():
    teacher, student, batch = Body(), Body(), token_batch()
    with pytest.raises(ValueError, match="temperature 0 must be above 0; soft -1, hard 1"):
        DistillationLoss(teacher, temperature=0, soft=-1, hard=1)
    with pytest.raises(ValueError, match="not all 0"):
        DistillationLoss(teacher, soft=0, hard=0, cosine=0)
    student.embed_tokens = teacher.embed_tokens
    with pytest.raises(ValueError, match=r"share 1 trainable parameters \(embed_tokens.weight, ...\).*deepcopy"):
        DistillationLoss(teacher)(student, batch)
    student.embed_tokens.requires_grad_(False)
    DistillationLoss(teacher)(student, batch)  # a shared part that nobody trains does no harm
    with pytest.raises(ValueError, match="the student's vocabulary has 7 tokens, the teacher's 31"):
        DistillationLoss(teacher)(Body(nn.Linear(D, 7)), batch)
    narrow = build(ModelConfig(vocab_size=V, hidden_size=4, num_layers=1, num_heads=1, max_positions=64)).double()
    batch["mask"][:] = True
    with pytest.raises(ValueError, match=r"4 features in the student and 8 in the teacher.*choose cosine=0"):
        DistillationLoss(teacher)(narrow, batch)
    assert DistillationLoss(teacher, cosine=0)(narrow, batch).value > 0
    with pytest.raises(ValueError, match="DistillationLoss: Linear has no hidden and no lm_head"):
        DistillationLoss(nn.Linear(2, 2))(student, batch)


# --- from text to a resumed run

BYTES = ByteTokenizer(["<mask>", *(f"<extra_id_{i}>" for i in range(9))])
SENTINELS = tuple(BYTES.special_ids[f"<extra_id_{i}>"] for i in range(9))
MASK, SIZE, EOS, PAD = BYTES.special_ids["<mask>"], BYTES.vocab_size, BYTES.eos_id, BYTES.pad_id
OBJECTIVES = {
    "masked": (masked_lm_loss, MaskedLanguageModeling(MASK, SIZE, tuple(BYTES.special_ids.values()))),
    "spans": (seq2seq_loss, SpanCorruption(SENTINELS, SIZE, EOS, PAD, PAD)),
    "infilling": (seq2seq_loss, TextInfilling(MASK, SIZE, EOS, PAD, EOS, sentence_ends=(ord("."),))),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_on_two_languages_is_the_uninterrupted_one(tmp_path, name):
    loss_fn, objective = OBJECTIVES[name]
    texts = {"en": "The cat sat. It saw a mouse. ", "sl": "Mačka sedi. Vidi miš. "}
    files = {
        language: write_tokens([Document(str(i), text * i) for i in range(1, 9)], BYTES, tmp_path / language)
        for language, text in texts.items()
    }

    def trainer(run):
        torch.manual_seed(0)
        sizes = {"vocab_size": SIZE, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 128}
        if name == "masked":
            model = build_with_head(ModelConfig(**sizes, kind="encoder"), HeadConfig(task="masked_lm"))
        else:
            model = build(ModelConfig(**sizes, kind="encoder_decoder"))
        loaders = {language: ObjectiveLoader(file, objective, 2, 40, seed=1) for language, file in files.items()}
        loader = MixedLoader(loaders, sampling_probabilities({"en": 300, "sl": 100}, alpha=0.3), seed=2)
        config = TrainConfig(steps=8, log_every=1, save_every=3, keep_checkpoints=9, device="cpu")
        return Trainer(model, loss_fn, loader, config, tmp_path / run)

    trainer("whole").fit()
    trainer("parts").fit()
    resumed = trainer("parts")
    assert resumed.resume(3) == 3  # forgets what came after, to write it again
    resumed.fit()
    records = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "parts")]
    assert records[0].count("\n") == 8 and records[0] == records[1]


# --- models and batches that do not fit


@pytest.mark.parametrize("loss_fn", [causal_lm_loss, masked_lm_loss, seq2seq_loss], ids=lambda f: f.__name__)
def test_a_model_or_batch_that_does_not_fit_is_told_how_to_go_on(loss_fn):
    with pytest.raises(ValueError, match=f"{loss_fn.__name__}: the batch has no .*labels.*; it has") as error:
        loss_fn(nn.Linear(2, 2), {"inputs": torch.zeros(1)})
    for part in (
        "Linear has no hidden and no lm_head",
        "it has ['inputs']",
        "write your own",
        "return Loss(",
        "Trainer(",
    ):
        assert part in str(error.value)


def test_the_loss_of_the_error_message_works(tmp_path):
    """What the message tells to write is run as it stands there."""
    with pytest.raises(ValueError) as error:
        causal_lm_loss(nn.Linear(2, 2), {})
    lines = str(error.value).splitlines()
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def my_loss"))
    code = "\n".join(line[4:] for line in lines[first : first + 4])
    names = {"F": F, "Loss": Loss}
    exec(code, names)
    model, batch = nn.Linear(2, 3), {"inputs": torch.randn(5, 2), "targets": torch.randint(3, (5,))}
    found = names["my_loss"](model, batch)
    assert found.weight == 5 and found.value == F.cross_entropy(model(batch["inputs"]), batch["targets"])


def test_an_encoder_decoder_needs_a_source():
    with pytest.raises(
        ValueError, match=r"seq2seq_loss: the batch has no source; it has \['labels', 'mask', 'tokens'\]"
    ):
        seq2seq_loss(Body(), token_batch())
    with pytest.raises(ValueError, match=r"label_smoothing 1\.0 is not in"):
        seq2seq_loss(Body(), token_batch(source=True), label_smoothing=1.0)


@pytest.mark.parametrize(
    "loss_fn, scores, labels, message",
    [
        (classification_loss, (3, 2), [0, 1, 2], r"labels \[2\] are not among the 2 classes 0..1"),
        (classification_loss, (3, 2), [0, 1, -1], r"labels \[-1\]"),
        (classification_loss, (3, 2), [0, 1], r"labels are \(2,\), logits \(3, 2\)"),
        (classification_loss, (3, 2), [0.0, 1.0, 1.0], "whole numbers"),
        (tagging_loss, (3, 4, 2), [0, 1, 1], r"labels are \(3,\), logits \(3, 4, 2\)"),
        (choice_loss, (3, 2), [0, 1, 5], r"labels \[5\] are not among the 2"),
        (span_loss, (3, 2), [[0, 1]], r"logits are \(3, 2\); a start and an end"),
        (span_loss, (3, 4, 2), [[0, 1]], r"labels are \(1, 2\)"),
        (multi_label_loss, (2, 2), [[0, 2.0], [-1, 1]], r"labels \[-1.0, 2.0\] are not from 0 to 1"),
        (multi_label_loss, (2, 2), [[0.0, float("nan")], [1, 1]], r"labels \[nan\]"),
        (multi_label_loss, (2, 2), [0.0, 1.0], r"labels are \(2,\), logits \(2, 2\)"),
        (regression_loss, (4, 2), [0.0, 1.0, 2.0, 3.0], r"labels are \(4,\), outputs \(4, 2\)"),
        (regression_loss, (4,), [[0.0], [1.0], [2.0], [3.0]], r"labels are \(4, 1\), outputs \(4,\)"),
    ],
)
def test_labels_that_do_not_fit(loss_fn, scores, labels, message):
    batch = {"tokens": torch.zeros(1), "labels": torch.tensor(labels)}
    with pytest.raises(ValueError, match=f"{loss_fn.__name__}: .*{message}"):
        loss_fn(Scores(*scores), batch)
    with pytest.raises(ValueError, match=f"{loss_fn.__name__}: the batch has no labels and no tokens"):
        loss_fn(Scores(*scores), {})


def test_an_answer_on_padding_is_refused():
    batch = {"tokens": torch.zeros(2, 4), "labels": torch.tensor([[0, 1], [2, 9]])}
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with pytest.raises(ValueError, match=r"span_loss: answers on padding in rows \[1\]"):
        span_loss(Scores(2, 4, 2), batch | {"mask": mask})
    assert span_loss(Scores(2, 4, 2), batch | {"mask": mask | True}).weight == 3


def test_losses_work_as_partials(tmp_path):
    """As the docstring shows: options are given with functools.partial."""
    batch = token_batch(source=True)
    loss = functools.partial(seq2seq_loss, label_smoothing=0.1)
    assert set(loss(Body(), batch).metrics) == {"nll"}


@pytest.mark.parametrize(
    "loss_fn, kind, why",
    [
        (causal_lm_loss, "encoder", "sees the tokens it should predict"),
        (masked_lm_loss, "decoder", "cannot see what follows a hidden token"),
        (seq2seq_loss, "decoder", "reads no source"),
        (causal_lm_loss, "encoder_decoder", "needs a source"),
    ],
)
def test_a_loss_refuses_a_model_that_it_would_teach_nothing(loss_fn, kind, why):
    config = ModelConfig(kind=kind, vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
    model = build_with_head(config, HeadConfig("masked_lm")) if kind == "encoder" else build(config)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=f"is of kind '{kind}', which {why}; the losses are"):
        loss_fn(model, {"source": tokens, "tokens": tokens, "labels": tokens})
