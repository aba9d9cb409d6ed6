"""The encoder: equal to torch.nn.TransformerEncoder with the same weights, whatever stands around the text."""

import math

import jaxtyping
import pytest
import torch
from torch import nn

from minillm.models import Encoder, ModelConfig, build

D, V = 12, 23
BERT = dict(
    kind="encoder",
    positions="learned",
    norm="layer",
    norm_first=False,
    mlp="plain",
    activation="gelu",
    attention_bias=True,
    mlp_bias=True,
    embed_norm=True,
    token_types=2,
)
POSITIONS = ["rope", "learned", "sinusoidal", "relative"]


def encoder(**fields) -> Encoder:
    sizes = dict(vocab_size=V, hidden_size=D, num_layers=2, num_heads=3, intermediate_size=20, max_positions=16)
    model = build(ModelConfig(**sizes | dict(kind="encoder") | fields)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(parameter.dim() == 1)
    return model


def torch_twin(ours: Encoder) -> nn.TransformerEncoder:
    c = ours.config
    options = dict(dropout=0.0, activation="gelu", layer_norm_eps=c.norm_eps, batch_first=True)
    layer = nn.TransformerEncoderLayer(D, c.num_heads, c.intermediate_size, norm_first=c.norm_first, **options)
    final = nn.LayerNorm(D, c.norm_eps) if c.norm_first else None
    theirs = nn.TransformerEncoder(layer, c.num_layers, final, enable_nested_tensor=False).double()
    for block, other in zip(ours.layers, theirs.layers, strict=True):
        attention = block.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        other.self_attn.load_state_dict(
            {f"in_proj_{name}": torch.cat([getattr(p, name) for p in projections]) for name in ("weight", "bias")}
            | {f"out_proj.{name}": value for name, value in attention.o_proj.state_dict().items()}
        )
        modules = [(block.attn_norm, other.norm1), (block.mlp_norm, other.norm2)]
        for mine, its in [*modules, (block.mlp.up_proj, other.linear1), (block.mlp.down_proj, other.linear2)]:
            its.load_state_dict(mine.state_dict())
    if c.norm_first:
        theirs.norm.load_state_dict(ours.norm.state_dict())
    return theirs.train()  # its eval mode takes another way, which needs no gradient


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", ["nothing", "padding", "per query"])
def test_bert_is_torchs_encoder_on_normalised_embeddings(norm_first, masked):
    ours = encoder(**BERT | dict(norm_first=norm_first))
    theirs = torch_twin(ours)
    tokens, types = torch.randint(0, V, (3, 7)), torch.randint(0, 2, (3, 7))
    padding = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    per_query = (torch.rand(3, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
    mask = {"nothing": None, "padding": padding, "per query": per_query}[masked]
    positions = padding.long().cumsum(-1) - 1 if masked == "padding" else torch.arange(7)
    x = ours.embed_tokens.weight[tokens] + ours.embed_positions.weight[positions] + ours.embed_types.weight[types]
    norm = ours.embed_norm
    x = nn.functional.layer_norm(x, (D,), norm.weight, norm.bias, norm.eps)
    if masked == "per query":
        expected = theirs(x, mask=~per_query.repeat_interleave(3, dim=0))  # one for each head
    else:
        expected = theirs(x, src_key_padding_mask=None if mask is None else ~padding)
    given = ours(tokens, mask=mask, token_types=types)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)
    assert torch.equal(given, ours.hidden(tokens, mask=mask, token_types=types))


def test_every_position_sees_every_other():
    model, tokens = encoder(), torch.randint(0, V, (1, 6))
    before = model(tokens)
    for changed in (0, 5):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % V
        assert ((model(other) - before).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("left, right", [(3, 0), (0, 3), (2, 1)])
def test_padding_on_either_side_changes_nothing(positions, left, right):
    model = encoder(positions=positions)
    text = torch.randint(0, V, (2, 5))
    padded = nn.functional.pad(text, (left, right), value=4)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    mask[:, left : left + 5] = True
    torch.testing.assert_close(model(padded, mask=mask)[:, left : left + 5], model(text), rtol=0, atol=1e-12)


def test_masks_per_query_keep_documents_apart():
    model = encoder(positions="learned")
    first, second = torch.randint(0, V, (1, 4)), torch.randint(0, V, (1, 3))
    document = torch.tensor([0] * 4 + [1] * 3)
    positions = torch.cat([torch.arange(4), torch.arange(3)])
    packed = model(torch.cat([first, second], 1), mask=(document[:, None] == document)[None], positions=positions)
    torch.testing.assert_close(packed, torch.cat([model(first), model(second)], 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, BERT, dict(positions="sinusoidal")], ids=["plain", "bert", "scaled"])
def test_embeds_are_the_same_door_as_tokens(fields):
    model, tokens = encoder(**fields), torch.randint(0, V, (2, 5))
    torch.testing.assert_close(model(embeds=model.embed_tokens(tokens)), model(tokens), rtol=0, atol=0)
    with pytest.raises(ValueError, match="give either tokens or embeds"):
        model()


def test_token_types_are_zero_unless_given():
    model, tokens = encoder(**BERT), torch.randint(0, V, (2, 5))
    types = torch.zeros_like(tokens)
    torch.testing.assert_close(model(tokens), model(tokens, token_types=types), rtol=0, atol=0)
    assert not torch.allclose(model(tokens), model(tokens, token_types=types + 1))
    with pytest.raises(ValueError, match=r"knows no token types \(token_types=0 in its config\): leave them out"):
        encoder()(tokens, token_types=types)


def test_embeddings_are_scaled_where_sinusoids_are_added_or_where_it_is_asked_for():
    for fields, scale in (
        (dict(positions="sinusoidal"), math.sqrt(D)),
        (dict(positions="sinusoidal", scale_embeddings=False), 1.0),
        (dict(positions="learned"), 1.0),
        (dict(positions="learned", scale_embeddings=True), math.sqrt(D)),
    ):
        model, read = encoder(**fields), []
        model.layers[0].register_forward_pre_hook(lambda module, args, read=read: read.append(args[0]))
        model(torch.tensor([[3, 7]]))
        expected = scale * model.embed_tokens.weight[[3, 7]] + model.embed_positions(torch.arange(2)).double()
        torch.testing.assert_close(read[0][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [dict(positions="relative"), BERT], ids=["relative", "bert"])
def test_gradient_checkpointing_changes_no_gradient(fields):
    model, tokens = encoder(**fields).train(), torch.randint(0, V, (2, 5))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(tokens, mask=torch.arange(5) < torch.tensor([[5], [3]])).sin().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("where", ["embedding", "sublayers", "attention"])
def test_dropout_is_for_training_and_keeps_the_mean(where):
    """Without norms and with even weights the output is linear in what is dropped, so its mean is that without."""
    p = 0.25
    fields = dict(attention_dropout=p) if where == "attention" else dict(dropout=p, attention_dropout=0.0)
    model = encoder(**fields, num_layers=1, norm="rms", mlp="plain", activation="relu")
    for block in model.layers:
        block.attn_norm = block.mlp_norm = nn.Identity()
    model.norm = nn.Identity()
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight.zero_()  # weights are 1/T, whatever is dropped before
        model.layers[0].mlp.down_proj.weight.zero_()
        if where == "embedding":
            model.layers[0].self_attn.o_proj.weight.zero_()
        else:
            model.dropout = nn.Identity()
        tokens = torch.randint(0, V, (1, 4))
        assert torch.equal(model(tokens), model(tokens))
        expected = model(tokens)[0]
        outputs = model.train()(tokens.expand(20000, -1))
    assert outputs.std(0).max() > 0.05
    error = 6 * outputs.std(0) / math.sqrt(len(outputs)) + 1e-12  # six standard errors
    assert ((outputs.mean(0) - expected).abs() <= error).all()


def test_attention_dropout_follows_dropout_unless_given():
    assert encoder(dropout=0.2).layers[0].self_attn.dropout == 0.2
    model = encoder(dropout=0.2, attention_dropout=0.0)
    assert model.layers[0].self_attn.dropout == 0.0 and model.layers[0].dropout.p == model.dropout.p == 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder_decoder"])
def test_a_mask_of_numbers_is_refused(kind, dtype, monkeypatch):
    """The Hub's tokenizers give masks of 1 and 0; added to the scores, as torch would do, they hide nothing."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # in tests it would refuse them before
    model, tokens = encoder(kind=kind), torch.randint(0, V, (2, 4))
    ones, rows = torch.ones(2, 4, dtype=dtype), 2 if kind == "encoder_decoder" else 1
    masks = {"source_mask": ones} if kind == "encoder_decoder" else {"mask": ones}
    with pytest.raises(ValueError, match=r"mask is torch\.\w+: masks are torch\.bool here.*\.bool\(\)"):
        model(*[tokens] * rows, **masks)
    if kind == "encoder_decoder":
        with pytest.raises(ValueError, match="memory_mask is"):
            model.decoder(tokens, memory=torch.zeros(2, 4, D).double(), memory_mask=ones)


@pytest.mark.parametrize("token", [-100, V])
def test_ids_outside_the_vocabulary(token):
    with pytest.raises(
        ValueError, match=rf"token ids from .*, but the vocabulary is 0\.\.{V - 1}: use the model's own"
    ):
        encoder()(torch.tensor([[3, token]]))
