"""P-tuning: the prompt encoder beside peft's, and what becomes of its network."""

import copy

import pytest
import torch

from minillm.generation import generate_tokens
from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.peft import LoraConfig, activate, flatten, load_adapter, merge, save_adapter, tune, tunings_of, unload
from minillm.peft.prompt import PromptConfig
from minillm.peft.ptuning import PTuningConfig, PTuningGate

P = 5
SMALL = dict(vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, max_positions=64)
ENCODERS = pytest.mark.parametrize("encoder", ["mlp", "lstm"])


def peft_s(encoder, hidden, layers=2):
    from peft import PromptEncoder, PromptEncoderConfig

    config = PromptEncoderConfig(
        peft_type="P_TUNING",
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        token_dim=24,
        num_transformer_submodules=1,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=hidden,
        encoder_num_layers=layers,
    )
    return PromptEncoder(config).double()


def pairs(gate, theirs):
    """(our parameter, theirs): each LSTM layer's two directions, then the linear layers."""
    linears = [[m for m in net if isinstance(m, torch.nn.Linear)] for net in (gate.projection, theirs.mlp_head)]
    yield gate.embeddings, theirs.embedding.weight
    for ours, other in zip(*linears, strict=True):
        yield from ((ours.weight, other.weight), (ours.bias, other.bias))
    for depth, layer in enumerate(gate.lstm.layers if gate.lstm else ()):
        for cell, end in zip(layer, (f"l{depth}", f"l{depth}_reverse"), strict=True):
            yield cell.input_proj.weight, getattr(theirs.lstm_head, f"weight_ih_{end}")
            yield cell.hidden_proj.weight, getattr(theirs.lstm_head, f"weight_hh_{end}")
            yield cell.input_proj.bias, getattr(theirs.lstm_head, f"bias_ih_{end}")


@pytest.mark.parametrize("encoder, layers", [("mlp", 2), ("lstm", 1), ("lstm", 3)])
def test_vectors_and_gradients_are_peft_s(encoder, layers):
    """The same weights, in float64; torch's LSTM has a second bias, which is 0 here."""
    body = build(ModelConfig(**SMALL)).double()
    gate = PTuningGate(body, PTuningConfig(length=P, hidden_size=7, encoder=encoder, layers=layers), "cpu")
    theirs = peft_s(encoder, 7, layers)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
        gate.embeddings.zero_()
        for ours, other in pairs(gate, theirs):
            ours.copy_(other)
        for name, parameter in theirs.named_parameters():
            if "bias_hh" in name:
                parameter.zero_()
    assert len(list(pairs(gate, theirs))) == len(list(gate.parameters()))
    vectors, expected = gate(), theirs(torch.arange(P))
    torch.testing.assert_close(vectors, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(vectors)
    (vectors * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, other in pairs(gate, theirs):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-10, atol=1e-12)
        assert ours.grad.any()


@ENCODERS
@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder_decoder"])
def test_the_model_reads_what_the_network_makes(encoder, kind, tokens):
    base = build(ModelConfig(kind=kind, **SMALL)).eval()
    model = copy.deepcopy(base)
    tune(model, PTuningConfig(length=P, hidden_size=6, encoder=encoder))
    vectors = model.prompt()
    assert not torch.allclose(vectors, model.prompt.embeddings)
    embeds = torch.cat([vectors.expand(len(tokens), -1, -1), base.embed_tokens(tokens)], dim=1)
    if kind == "encoder_decoder":
        outputs, expected = model(tokens, tokens), base(tokens=tokens, source_embeds=embeds)
    else:
        outputs, expected = model(tokens), base(embeds=embeds)[:, P:]
    torch.testing.assert_close(outputs, expected)
    outputs.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("prompt.")}


@ENCODERS
@pytest.mark.parametrize("positions", ["rope", "sinusoidal"])
def test_the_prompt_starts_as_large_as_embeddings(encoder, positions):
    """peft's MLP begins with a standard deviation of 0.1 at D = 768, where embeddings have 0.02."""
    model = build(ModelConfig(positions=positions, **SMALL))
    tune(model, PTuningConfig(length=P, encoder=encoder))
    scale = 24**0.5 if positions == "sinusoidal" else 1.0
    expected = model.embed_tokens.weight.std() * scale
    torch.testing.assert_close(model.prompt().std(), expected, rtol=1e-4, atol=0.0)


@ENCODERS
def test_training_goes_on_where_it_was_saved(encoder, tokens, tmp_path):
    """peft saves the flat vectors only: "Cannot set a prompt learning adapter to trainable"."""
    base = build(ModelConfig(**SMALL))
    config = PTuningConfig(length=P, hidden_size=6, encoder=encoder)

    def steps(model, count):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(count):
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()

    straight, broken, resumed = (copy.deepcopy(base) for _ in range(3))
    torch.manual_seed(3)
    tune(straight, config)
    torch.manual_seed(3)
    tune(broken, config)
    steps(straight, 4)
    steps(broken, 2)
    save_adapter(broken, tmp_path / "half")
    load_adapter(resumed, tmp_path / "half")
    steps(resumed, 2)
    assert torch.equal(resumed(tokens), straight(tokens))
    assert not torch.equal(resumed(tokens), broken(tokens))


@ENCODERS
def test_flatten_keeps_the_outputs_and_p_d_values(encoder, tokens, tmp_path):
    model = build_with_head(ModelConfig(kind="encoder", **SMALL), HeadConfig(dropout=0.0)).train()
    fresh = copy.deepcopy(model)
    tune(model, PTuningConfig(length=P, encoder=encoder, layers=2, dropout=0.5, trainable=("classifier",)))
    with torch.no_grad():
        model.classifier.weight.normal_()
    expected = model.eval()(tokens)
    model.train()
    flatten(model)
    tuning = tunings_of(model)["default"]
    assert isinstance(tuning.config, PromptConfig) and tuning.plan.count == P * 24 + 24 * 2 + 2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == tuning.plan.count
    assert torch.equal(model(tokens), expected)  # no network, so no dropout is left either
    assert model.body.prompt.training
    model(tokens).sum().backward()
    assert model.body.prompt.embeddings.grad.any() and model.classifier.weight.grad.any()
    save_adapter(model, tmp_path / "flat")
    load_adapter(fresh, tmp_path / "flat")
    assert torch.equal(fresh.eval()(tokens), model.eval()(tokens))
    unload(model)
    assert not any("prompt" in name for name in model.state_dict())


def test_flatten_leaves_other_adapters_as_they_are(tokens):
    model = build(ModelConfig(**SMALL)).eval()
    tune(model, PTuningConfig(length=P), "network")
    tune(model, LoraConfig(rank=2, alpha=3.0), "lora")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    expected = model(tokens)
    flatten(model, "network")
    assert torch.equal(model(tokens), expected)
    assert [(name, t.trains) for name, t in tunings_of(model).items()] == [("network", False), ("lora", True)]
    assert not model.prompt.embeddings.requires_grad
    for wrong, what in (("lora", "'lora' is LoraConfig"), ("network", "'network' is PromptConfig")):
        with pytest.raises(ValueError, match=f"{what}.*it has no network that makes its vectors"):
            flatten(model, wrong)
    activate(model, "network")
    assert model.prompt.embeddings.requires_grad


def test_flatten_of_an_adapter_that_rests(tokens):
    model = build(ModelConfig(**SMALL)).eval()
    base = model(tokens)
    tune(model, PTuningConfig(length=P), "network")
    tuned = model(tokens)
    activate(model)
    flatten(model, "network")
    assert torch.equal(model(tokens), base)
    activate(model, "network")
    torch.testing.assert_close(model(tokens), tuned)


@ENCODERS
def test_dropout_acts_in_training_alone(encoder, tokens):
    model = build(ModelConfig(**SMALL)).eval()
    tune(model, PTuningConfig(length=P, encoder=encoder, dropout=0.5))
    assert torch.equal(model(tokens), model(tokens))  # what is put into a model in eval mode is in eval mode
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
    model.train()
    assert torch.equal(*(generate_tokens(model, tokens, max_new_tokens=3) for _ in range(2))) and model.training


def test_the_network_runs_once_for_a_generation(tokens):
    model = build(ModelConfig(**SMALL)).eval()
    tune(model, PTuningConfig(length=P))
    calls = []
    model.prompt.projection.register_forward_hook(lambda *_: calls.append(1))
    generate_tokens(model, tokens, max_new_tokens=5)
    assert len(calls) == 1


def test_the_adapter_is_float32_on_a_half_precision_base(tokens):
    model = build(ModelConfig(**SMALL)).to(torch.bfloat16)
    tune(model, PTuningConfig(length=P))
    assert {p.dtype for p in model.prompt.parameters()} == {torch.float32}
    model(tokens).float().square().mean().backward()
    assert all(p.grad.any() for p in model.prompt.parameters())


def test_a_lora_does_not_adapt_the_prompt_encoder():
    model = build(ModelConfig(**SMALL))
    tune(model, PTuningConfig(length=P), "network")
    report = tune(model, LoraConfig(rank=2, alpha=3.0, targets=("all-linear",)), "lora")
    assert not any("prompt" in name for name in report.modules)


def test_it_cannot_be_merged():
    model = build(ModelConfig(**SMALL))
    tune(model, PTuningConfig(length=P))
    with pytest.raises(ValueError, match="more to read, not a change of weights"):
        merge(model)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(length=-1), "length: a number of vectors, at least 1, not -1"),
        (dict(hidden_size=0), "hidden_size: a whole number, at least 1, not 0"),
        (dict(layers=None), "layers: a whole number, at least 1, not None"),
        (dict(encoder="LSTMs"), "did you mean one of lstm, mlp"),
        (dict(dropout=1.0), "dropout: a probability in .0, 1., not 1.0"),
        (dict(dropout="much"), "dropout: a probability"),
        (dict(dropout=0.1, layers=1), "acts between LSTM layers, and layers=1 leaves no between"),
        (dict(length=0, layers=0, encoder="x"), "(?s)length.*layers.*encoder"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PTuningConfig(**fields)
