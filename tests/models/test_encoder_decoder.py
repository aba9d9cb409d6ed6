"""The encoder-decoder's own promises: one embedding matrix, a source read once, a cache that changes nothing."""

import copy

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from minillm.layers import KVCache, StaticKVCache
from minillm.models import EncoderDecoder, ModelConfig, build

V = 23
POSITIONS = ["rope", "learned", "sinusoidal", "relative"]
SAME = dict(rtol=0, atol=1e-12)  # float64


def make(**fields) -> EncoderDecoder:
    sizes = dict(vocab_size=V, hidden_size=12, num_layers=2, num_heads=2, intermediate_size=20, max_positions=16)
    model = build(ModelConfig(**sizes | dict(kind="encoder_decoder") | fields)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4).add_(parameter.dim() == 1)
    return model


def caches(model, kind="growing", batch_size=3):
    c = model.config
    if kind == "growing":
        return [KVCache() for _ in model.layers]
    return [StaticKVCache(batch_size, c.num_kv_heads, 16, c.head_dim, torch.float64) for _ in model.layers]


@pytest.fixture
def source():
    return torch.randint(0, V, (3, 7))


@pytest.fixture
def tokens():
    return torch.randint(0, V, (3, 6))


SOURCE_MASKS = {
    "none": None,
    "right": torch.arange(7) < torch.tensor([7, 4, 1])[:, None],
    "left": torch.arange(7) >= torch.tensor([0, 3, 6])[:, None],
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("padding", SOURCE_MASKS)
@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("pieces", [[1] * 6, [3, 1, 2]], ids=str)
def test_cache_changes_nothing(source, tokens, positions, padding, kind, pieces):
    model, source_mask = make(positions=positions, num_kv_heads=1), SOURCE_MASKS[padding]
    expected = model(source, tokens, source_mask=source_mask)
    conditioned, cache = model.condition(source, source_mask), caches(model, kind)
    direct = caches(model, kind)
    with torch.no_grad():
        for piece, want in zip(tokens.split(pieces, 1), expected.split(pieces, 1), strict=True):
            torch.testing.assert_close(conditioned(piece, cache=cache), want, **SAME)
            torch.testing.assert_close(model(source, piece, source_mask=source_mask, cache=direct), want, **SAME)
    assert cache[0].offset == 6


@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padded_targets_with_a_cache(source, tokens, positions):
    """The decoder's mask is its own: padding before the target, as generation from prefixes of several lengths has."""
    model, mask = make(positions=positions), torch.arange(6) >= torch.tensor([0, 2, 3])[:, None]
    conditioned, cache = model.condition(source, SOURCE_MASKS["right"]), caches(model)
    given = [conditioned(tokens[:, :4], mask=mask[:, :4], cache=cache)]
    given += [conditioned(tokens[:, t : t + 1], mask=mask[:, : t + 1], cache=cache) for t in (4, 5)]
    given = torch.cat(given, 1)
    for row in range(3):
        text = source[row][SOURCE_MASKS["right"][row]]
        alone = model(text[None], tokens[row][mask[row]][None])[0]
        torch.testing.assert_close(given[row][mask[row]], alone, **SAME)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("left, right", [(4, 0), (0, 4), (1, 3)])
def test_source_padding_on_either_side_changes_nothing(source, tokens, positions, left, right):
    model = make(positions=positions)
    padded = pad(source, (left, right), value=5)
    mask = pad(torch.ones_like(source, dtype=torch.bool), (left, right))
    torch.testing.assert_close(model(padded, tokens, source_mask=mask), model(source, tokens), **SAME)


@pytest.mark.parametrize("rows", [[1, 1, 0], [2], [0, 0, 1, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_reordered_rows_keep_their_source(source, tokens, rows, padding):
    model, source_mask = make(positions="relative"), SOURCE_MASKS[padding]
    conditioned, cache, rows = model.condition(source, source_mask), caches(model), torch.tensor(rows)
    conditioned(tokens[:, :4], cache=cache)
    for layer_cache in cache:
        layer_cache.reorder(rows)
    new = torch.randint(0, V, (len(rows), 1))
    mask = None if source_mask is None else source_mask[rows]
    expected = model(source[rows], torch.cat([tokens[rows, :4], new], 1), source_mask=mask)
    torch.testing.assert_close(conditioned(new, cache=cache)[:, -1], expected[:, -1], **SAME)


def test_the_source_is_read_once(source, tokens):
    model, calls = make(), []
    watched = {"encoder": model.encoder}
    for i, layer in enumerate(model.layers):
        watched |= {f"{i} {name}": getattr(layer.cross_attn, name) for name in ("q_proj", "k_proj", "v_proj")}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    conditioned, cache = model.condition(source), caches(model)
    for token in tokens.split(1, 1):
        conditioned(token, cache=cache)
    counts = {name: calls.count(name) for name in watched}
    assert counts == {name: 6 if "q_proj" in name else 1 for name in watched}


def test_a_conditioned_model_is_the_direct_call(source, tokens):
    model, mask = make(tie_embeddings=False), SOURCE_MASKS["left"]
    conditioned = model.condition(source, mask)
    direct = model(source, tokens, source_mask=mask)
    assert torch.equal(conditioned(tokens), direct)
    assert torch.equal(conditioned.lm_head(conditioned.hidden(tokens)), direct)
    assert torch.equal(conditioned.hidden(embeds=conditioned.embed_tokens(tokens)), conditioned.hidden(tokens))
    assert conditioned.config is model.config and conditioned.layers is model.decoder.layers
    model.tokenizer_fingerprint = "abc"
    assert model.condition(source).tokenizer_fingerprint == "abc"


def test_the_parts_make_the_whole(source, tokens):
    model, mask = make(num_decoder_layers=3), SOURCE_MASKS["right"]
    assert (len(model.encoder.layers), len(model.layers)) == (2, 3)
    expected = model(source, tokens, source_mask=mask)
    by_parts = model.decoder(tokens, memory=model.encode(source, mask), memory_mask=mask)
    assert torch.equal(by_parts, expected)
    assert torch.equal(model.lm_head(model.hidden(source, tokens, source_mask=mask)), expected)
    embeds = dict(source_embeds=model.embed_tokens(source), embeds=model.embed_tokens(tokens))
    assert torch.equal(model(**embeds, source_mask=mask), expected)


def test_the_target_is_causal_and_the_source_is_not(source, tokens):
    model = make()
    before = model(source, tokens)
    later = tokens.clone()
    later[:, 3] = (later[:, 3] + 1) % V
    assert torch.equal(model(source, later)[:, :3], before[:, :3])
    last = source.clone()
    last[:, -1] = (last[:, -1] + 1) % V
    assert ((model(last, tokens) - before).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_matrices_are_one_and_their_gradient_the_sum(source, tokens, tied):
    model = make(tie_embeddings=tied)
    assert model.encoder.embed_tokens is model.decoder.embed_tokens is model.embed_tokens
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    apart = copy.deepcopy(model)
    apart.decoder.embed_tokens = copy.deepcopy(model.embed_tokens)
    apart.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for twin in (model, apart):
        twin(source, tokens).sin().sum().backward()
    roles = [apart.encoder.embed_tokens, apart.decoder.embed_tokens] + [apart.lm_head] * tied
    summed = sum(role.weight.grad for role in roles)
    torch.testing.assert_close(model.embed_tokens.weight.grad, summed, **SAME)
    if not tied:
        torch.testing.assert_close(model.lm_head.weight.grad, apart.lm_head.weight.grad, **SAME)


@pytest.mark.parametrize("positions", POSITIONS)
def test_gradient_checkpointing_changes_nothing(source, tokens, positions):
    model, results = make(positions=positions).train(), []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        logits = model(source, tokens, source_mask=SOURCE_MASKS["left"])
        logits.sin().sum().backward()
        results.append([logits] + [parameter.grad.clone() for parameter in model.parameters()])
    assert model.encoder.gradient_checkpointing and model.decoder.gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(gradient.any() for gradient in results[0])


def test_a_deep_copy_stands_alone_and_stays_tied(source, tokens):
    model = make(positions="relative")
    before = model(source, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(source, tokens), before)
    assert twin.lm_head.weight is twin.encoder.embed_tokens.weight is twin.decoder.embed_tokens.weight
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(source, tokens), before)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_logit_scale_is_on_what_the_head_reads(source, tokens, kind):
    plain, scaled = make(kind=kind), make(kind=kind, logit_scale=0.25)
    scaled.load_state_dict(plain.state_dict())
    inputs = (source, tokens) if kind == "encoder_decoder" else (tokens,)
    torch.testing.assert_close(scaled(*inputs), plain(*inputs) * 0.25, **SAME)
    torch.testing.assert_close(scaled.hidden(*inputs), plain.hidden(*inputs) * 0.25, **SAME)
    body = EncoderDecoder(scaled.config, lm_head=False) if kind == "encoder_decoder" else None
    if body is not None:  # for other heads there is no LM head to scale for
        body.double().load_state_dict({n: p for n, p in plain.state_dict().items() if "lm_head" not in n})
        assert torch.equal(body.eval()(*inputs), plain.hidden(*inputs))


def test_the_start_has_the_stated_spread():
    """N(0, 0.02); into the residual stream divided by sqrt(2 L), or sqrt(3 L) where blocks have cross-attention; where
    scores are not divided by sqrt(K), queries are."""
    sizes = dict(vocab_size=300, hidden_size=96, num_layers=2, num_decoder_layers=3, num_heads=4, tie_embeddings=False)
    model = build(ModelConfig(kind="encoder_decoder", positions="relative", attention_bias=True, **sizes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        expected = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            expected /= (2 * 2 if name.startswith("encoder") else 3 * 3) ** 0.5
        elif name.endswith("q_proj.weight"):
            expected /= 24**0.5
        error = 5 * expected / (2 * parameter.numel()) ** 0.5  # five standard errors of a standard deviation
        assert parameter.std().item() == pytest.approx(expected, abs=error), name


def test_every_row_has_its_source(source, tokens, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # in tests it would refuse these before
    for rows in (1, 2):
        with pytest.raises(ValueError, match=f"{rows} sources for 3 rows of tokens: one for each"):
            make()(source[:rows], tokens)


def test_what_cannot_be_computed_is_refused(source, tokens):
    model = make()
    with pytest.raises(ValueError, match="reads an encoder's output: give memory, or call the whole"):
        model.decoder(tokens)
    with pytest.raises(ValueError, match="memory is for an encoder-decoder's decoder, not kind='decoder'"):
        make(kind="decoder")(tokens, memory=torch.zeros(3, 7, 12).double())
    with pytest.raises(ValueError, match="cache has 3 entries for 2 layers: one for each"):
        model(source, tokens, cache=[KVCache() for _ in range(3)])
    with pytest.raises(ValueError, match="has 17 positions and the model at most max_positions=16"):
        model(torch.zeros(3, 17, dtype=torch.long), tokens)
    with pytest.raises(ValueError, match="give either tokens or embeds"):
        model(source)
