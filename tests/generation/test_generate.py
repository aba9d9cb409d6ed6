"""The decoding loop against transformers' generate, and its invariants: batch = alone, cached = uncached."""

import math
import re

import pytest
import torch

from minillm.generation import generate, generate_tokens, greedy, sampler, static_cache
from minillm.layers import KVCache
from minillm.models import Decoder, HeadConfig, ModelConfig, build, build_with_head

V, T, NEW = 61, 7, 12


def tiny(kv_heads=2, **options):
    """Weights large enough that greedy decoding does not repeat one token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 40, "init_std": 0.5}
    return build(ModelConfig(**{**sizes, "num_kv_heads": kv_heads, "tie_embeddings": False, **options})).eval()


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def tokens():
    return torch.randint(1, V, (3, T), generator=torch.Generator().manual_seed(1))


def left_padded(tokens, lengths):
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask


def new_cache(model, kind, batch_size):
    return None if kind == "growing" else static_cache(model, batch_size, T + NEW)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_greedy_tokens_are_transformers(llama_twin, kv_heads, kind, padded, tokens):
    model, mask = tiny(kv_heads), None
    if padded:
        tokens, mask = left_padded(tokens, [T, 3, 1])
    want = llama_twin(model).generate(
        tokens,
        pad_token_id=0,
        attention_mask=torch.ones_like(tokens) if mask is None else mask.long(),
        max_new_tokens=NEW,
        do_sample=False,
    )[:, T:]
    got = generate_tokens(model, tokens, max_new_tokens=NEW, mask=mask, cache=new_cache(model, kind, len(tokens)))
    assert got.unique().numel() > 5  # a model that repeats one token would prove little
    assert torch.equal(got, want)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_cached_steps_are_whole_passes(positions, tokens):
    """Each new token is the argmax of an uncached pass over all tokens before it."""
    model = tiny(positions=positions)
    whole = tokens
    for ids in generate(model, tokens, max_new_tokens=NEW):
        with torch.no_grad():
            assert torch.equal(ids, model(whole)[:, -1].argmax(-1))
        whole = torch.cat([whole, ids[:, None]], dim=1)


def test_double_precision(tokens):
    model = tiny().double()
    for kind in ("growing", "static"):
        whole = tokens
        for ids in generate(model, tokens, max_new_tokens=NEW, cache=new_cache(model, kind, len(tokens))):
            with torch.no_grad():
                assert torch.equal(ids, model(whole)[:, -1].argmax(-1))
            whole = torch.cat([whole, ids[:, None]], dim=1)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_padded_rows_get_what_they_get_alone(positions, tokens):
    model, lengths = tiny(positions=positions), [T, 3, 1]
    padded, mask = left_padded(tokens, lengths)
    together = generate_tokens(model, padded, max_new_tokens=NEW, mask=mask)
    for row, length in enumerate(lengths):
        alone = generate_tokens(model, tokens[row : row + 1, T - length :], max_new_tokens=NEW)
        assert torch.equal(together[row : row + 1], alone)


def test_what_stands_in_the_padding_does_not_matter(model, tokens):
    padded, mask = left_padded(tokens, [T, 3, 1])
    zeros = generate_tokens(model, padded, max_new_tokens=NEW, mask=mask)
    assert torch.equal(generate_tokens(model, tokens, max_new_tokens=NEW, mask=mask), zeros)


def test_rows_end_by_themselves(model, tokens):
    free = generate_tokens(model, tokens, max_new_tokens=NEW)
    stop_ids = {free[0, 2].item(), free[1, 4].item()}
    got = generate_tokens(model, tokens, max_new_tokens=NEW, stop_ids=stop_ids, pad_id=0)
    lengths = []
    for row, want in zip(got, free.tolist(), strict=True):
        first = next((i for i, token in enumerate(want) if token in stop_ids), len(want) - 1)
        lengths.append(first + 1)
        assert row.tolist() == want[: first + 1] + [0] * (got.shape[1] - first - 1)
    assert got.shape[1] == max(lengths) and min(lengths) < NEW


def test_iterator_stops_when_every_row_has_ended(model, tokens):
    free = generate_tokens(model, tokens, max_new_tokens=1)
    assert generate_tokens(model, tokens, max_new_tokens=NEW, stop_ids=set(free.flatten().tolist())).shape == (3, 1)


def test_the_head_computes_one_position_per_step(model, tokens):
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    generate_tokens(model, tokens, max_new_tokens=4)
    assert seen == [3, 3, 3, 3]


def test_prompt_is_computed_once(model, tokens):
    seen = []
    model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    generate_tokens(model, tokens, max_new_tokens=4)
    assert seen == [T, 1, 1, 1]


def test_seed_repeats_a_sample(model, tokens):
    def sample(seed):
        draw = sampler(temperature=1.0, top_k=20, generator=torch.Generator().manual_seed(seed))
        return generate_tokens(model, tokens, max_new_tokens=NEW, sampler=draw)

    torch.manual_seed(123)
    first = sample(0)
    torch.manual_seed(456)  # the global generator plays no part
    assert torch.equal(first, sample(0)) and not torch.equal(first, sample(1))


@pytest.mark.parametrize("learned_prefix_rows", [1, 3])
def test_a_learned_prefix_is_seen_by_all_rows(model, tokens, learned_prefix_rows):
    """The cached keys of a real text, given as a prefix without positions, act as they did as text (no positions)."""
    model = tiny(positions="sinusoidal")
    c, generator = model.config, torch.Generator().manual_seed(2)
    shape = (2, 2, learned_prefix_rows, c.num_kv_heads, 4, c.head_dim)  # layer, key or value, rows, ...
    prefix = torch.randn(shape, generator=generator)

    def prefixed():
        return [KVCache((k, v)) for k, v in prefix]

    padded, mask = left_padded(tokens, [T, 3, 1])
    got = generate_tokens(model, padded, max_new_tokens=NEW, mask=mask, cache=prefixed())
    assert not torch.equal(got, generate_tokens(model, padded, max_new_tokens=NEW, mask=mask))
    whole, whole_mask = padded, mask
    for ids in got.T:
        with torch.no_grad():
            assert torch.equal(ids, model(whole, mask=whole_mask, cache=prefixed())[:, -1].argmax(-1))
        whole = torch.cat([whole, ids[:, None]], dim=1)
        whole_mask = torch.cat([whole_mask, torch.ones(3, 1, dtype=torch.bool)], dim=1)


# ---- what generation leaves behind


def test_modes_and_weights_are_as_before_at_every_step(model, tokens):
    model.train()
    model.layers[0].eval()  # a mixture must come back as a mixture
    modes = {name: module.training for name, module in model.named_modules()}
    memory = {name: (p.data_ptr(), p.stride(), p._version) for name, p in model.named_parameters()}
    for _ in generate(model, tokens, max_new_tokens=NEW):
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert memory == {name: (p.data_ptr(), p.stride(), p._version) for name, p in model.named_parameters()}
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_modes_come_back_after_an_error(model, tokens):
    model.train()
    memory = {name: p.data_ptr() for name, p in model.named_parameters()}

    def broken(logits):
        raise RuntimeError("sampler broke")

    with pytest.raises(RuntimeError, match="sampler broke"):
        generate_tokens(model, tokens, max_new_tokens=NEW, sampler=broken)
    assert all(module.training for module in model.modules())
    assert memory == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not torch.is_inference_mode_enabled()


def test_dropout_is_off_while_generating(tokens):
    model = tiny(dropout=0.5)
    want = generate_tokens(model.eval(), tokens, max_new_tokens=NEW)
    assert torch.equal(generate_tokens(model.train(), tokens, max_new_tokens=NEW), want)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_layout_changes_no_result(tokens, tied):
    """From 8 new tokens on, wide weights are read by columns; the first tokens must not differ."""
    model = tiny(tie_embeddings=tied)
    few, many = (generate_tokens(model, tokens, max_new_tokens=n) for n in (7, 8))
    assert torch.equal(few, many[:, :7])


def test_tokens_may_be_trained_on(model, tokens):
    """Inference tensors could not be saved for the backward pass."""
    ids = next(generate(model, tokens, max_new_tokens=3))
    model(ids[:, None]).sum().backward()
    assert model.embed_tokens.weight.grad is not None


def test_generation_between_training_steps_changes_no_weight(model, tokens):
    def train(generate_between):
        trained = tiny().train()
        optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
        for _ in range(3):
            trained(tokens).logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if generate_between:
                generate_tokens(trained, tokens, max_new_tokens=NEW)
        return trained.state_dict()

    with_generation, without = train(True), train(False)
    assert all(torch.equal(with_generation[name], tensor) for name, tensor in without.items())


# ---- bad input


def refused(match, model, tokens, **options):
    with pytest.raises(ValueError, match=match):
        generate(model, tokens, **{"max_new_tokens": 4, **options})  # refused at the call, not at the first token


@pytest.mark.parametrize(
    "length, max_new_tokens, advice",
    [
        (7, 34, "lower max_new_tokens to 33, or shorten the prompt to 6 (keep its end)"),
        (7, 40, "lower max_new_tokens to 33"),  # no prompt is short enough
        (40, 4, "shorten the prompt to 36 (keep its end)"),  # no continuation is short enough
        (40, 40, "shorten the prompt (keep its end) and lower max_new_tokens"),
    ],
)
def test_prompt_longer_than_the_model_allows(model, length, max_new_tokens, advice):
    refused(
        rf"prompt of {length} tokens \+ max_new_tokens={max_new_tokens} make {length + max_new_tokens}, more than the "
        rf"model's max_positions=40: {re.escape(advice)}$",
        model,
        torch.ones(1, length, dtype=torch.long),
        max_new_tokens=max_new_tokens,
    )


def test_the_longest_prompt_that_the_model_allows(model, tokens):
    assert generate_tokens(model, tokens, max_new_tokens=33).shape == (3, 33)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (5,)])
def test_empty_or_flat_prompt(model, shape):
    refused(rf"shape {re.escape(str(shape))}: need \(batch, length\)", model, torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("task", ["masked_lm", "classification", None])
def test_an_encoder_does_not_generate(task):
    config = ModelConfig(kind="encoder", vocab_size=V, hidden_size=32, num_layers=1, num_heads=4)
    encoder = build_with_head(config, HeadConfig(task)) if task else build(config)
    refused(rf"{type(encoder).__name__} cannot generate: that takes a decoder", encoder, torch.ones(1, 3).long())
    body = Decoder(ModelConfig(vocab_size=V, hidden_size=32, num_layers=1, num_heads=4), lm_head=False)
    refused(r"Decoder cannot generate: .*\(lm_head\)", body, torch.ones(1, 3).long())


def test_everything_wrong_in_one_message(model):
    refused(
        r"(?s)max_new_tokens=0: must be at least 1.*token ids \[-1, 61\] are outside the vocabulary 0\.\.60: use the "
        r"model's tokenizer.*stop_ids \[99\] are outside.*mask is torch.int64 of shape \(1, 2\): need torch.bool",
        model,
        torch.tensor([[-1, 3, 61]]),
        max_new_tokens=0,
        stop_ids=[99],
        mask=torch.ones(1, 2, dtype=torch.long),
    )


def test_padding_on_the_right_and_rows_of_padding(model, tokens):
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[0, -1] = False
    mask[2] = False
    refused(r"(?s)prompts \[2\] have no real token.*pad prompts on the left", model, tokens, mask=mask)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_named(model, tokens, value):
    model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError) as error:
        generate_tokens(model, tokens, max_new_tokens=2)
    message = str(error.value)
    assert "logits of row(s) [0, 1, 2] are not finite" in message
    assert "the first module with an output that is not finite is layers.1.mlp.up_proj (Linear)" in message
    assert "its parameters hold NaN or infinity themselves: weight (1 of " in message
    assert "training diverged" in message and "Load an earlier checkpoint" in message


def test_overflow_in_finite_weights_is_named(model, tokens):
    model.layers[0].mlp.down_proj.weight.data.mul_(1e38)
    with pytest.raises(ValueError, match=r"is layers\.0\.mlp\.down_proj.*are finite, so the result overflowed"):
        generate_tokens(model, tokens, max_new_tokens=2)


def test_overflow_between_modules_is_named(model, tokens):
    """gate * up overflows inside the MLP's own forward; down_proj is the first module to show it."""
    model.layers[0].mlp.gate_proj.weight.data.fill_(1e20)
    model.layers[0].mlp.up_proj.weight.data.fill_(1e20)
    with pytest.raises(ValueError, match=r"is layers\.0\.mlp\.down_proj.*input was not.*overflow in the op"):
        generate_tokens(model, tokens, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_later_step_that_breaks_is_explained_too(model, tokens, kind):
    """Only token 5 has a broken embedding, and the sampler chooses it at the third step."""
    model.embed_tokens.weight.data[5] = math.nan
    prompt, step = tokens.masked_fill(tokens == 5, 6), iter(range(NEW))

    def fives_later(logits):
        return greedy(logits).masked_fill(greedy(logits) == 5, 6) if next(step) < 2 else torch.full((3,), 5)

    made = []
    cache = None if kind == "growing" else static_cache(model, 3, T + 3)  # the step that breaks fills it to the brim
    with pytest.raises(ValueError, match=r"is embed_tokens \(Embedding\): its parameters hold NaN"):
        for ids in generate(model, prompt, max_new_tokens=NEW, sampler=fives_later, cache=cache):
            made.append(ids)
    assert len(made) == 3


def test_only_the_broken_row_is_blamed(model, tokens):
    model.embed_tokens.weight.data[5] = math.nan
    prompt = tokens.masked_fill(tokens == 5, 6)
    prompt[1, 2] = 5
    with pytest.raises(ValueError, match=r"logits of row\(s\) \[1\] are not finite"):
        generate_tokens(model, prompt, max_new_tokens=2)


def test_no_hooks_stay_on_the_model(model, tokens):
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="lm_head"):
        generate_tokens(model, tokens, max_new_tokens=2)
    assert not any(module._forward_hooks for module in model.modules())
