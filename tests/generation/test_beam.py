"""Beam search against transformers' generate, and against trying every continuation."""

import itertools
import math

import pytest
import torch

from minillm.generation import (
    beam_search,
    forced_last,
    generate_tokens,
    min_new_tokens,
    no_repeat_ngram,
    repetition_penalty,
    static_cache,
)
from minillm.layers import KVCache
from minillm.models import ModelConfig, build

T, NEW = 6, 10


@pytest.fixture
def twins(llama_twins):
    """`twins(seed, **fields)`: our decoder and transformers' with the same weights."""

    def make(seed=0, **fields):
        torch.manual_seed(seed)
        return llama_twins(**fields)

    return make


def prompts(vocab_size, batch_size=3):
    """Token ids (B, T) padded on the left, and their mask: rows of T, 3 and 1 real tokens."""
    tokens = torch.randint(0, vocab_size, (batch_size, T), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(T) >= torch.tensor([0, T - 3, T - 1])[:batch_size, None]
    return tokens.masked_fill(~mask, 0), mask


def theirs_search(model, tokens, mask, *, num_beams, num_return, stop_ids, pad_id, **options):
    """transformers' result as (tokens (B, n, L), scores (B, n))."""
    out = model.generate(
        tokens,
        attention_mask=mask.long(),
        num_beams=num_beams,
        num_return_sequences=num_return,
        do_sample=False,
        pad_token_id=pad_id,
        return_dict_in_generate=True,
        output_scores=True,
        **({"eos_token_id": stop_ids} if stop_ids else {}),
        **options,
    )
    new = out.sequences[:, tokens.shape[1] :]
    return new.view(len(tokens), num_return, -1), out.sequences_scores.view(len(tokens), num_return)


def assert_same(got, want):
    tokens, scores = want
    assert torch.equal(got.tokens, tokens)
    torch.testing.assert_close(got.scores, scores, atol=1e-5, rtol=1e-5)


CASES = [  # vocabulary, beams, stop ids, seed of the weights
    (5, 2, [1, 3], 7),
    (5, 4, [3], 0),  # fewer tokens than two times the beams
    (13, 3, [1, 3], 0),
    (61, 5, [], 0),
    (61, 2, [3], 0),
]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.5, 1.0, 2.0])
def test_is_transformers(twins, length_penalty, early_stopping):
    """All n best of padded batches: ids equal, scores to 1e-5."""
    lengths = set()
    for vocab_size, num_beams, stop_ids, seed in CASES:
        ours, theirs = twins(seed, vocab_size=vocab_size)
        tokens, mask = prompts(vocab_size)
        options = {
            "num_beams": num_beams,
            "num_return": num_beams,
            "max_new_tokens": NEW,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "stop_ids": stop_ids,
            "pad_id": vocab_size - 1 if stop_ids else -1,  # transformers takes 0 for "not given"
        }
        got = beam_search(ours, tokens, mask=mask, **options)
        assert_same(got, theirs_search(theirs, tokens, mask, **options))
        ended = torch.isin(got.tokens, torch.tensor(stop_ids, dtype=torch.long))
        lengths |= set(torch.where(ended.any(-1), ended.int().argmax(-1) + 1, NEW).flatten().tolist())
    assert len(lengths) > 2 and max(lengths) == NEW  # some end early, at different lengths, and some are cut off


def test_fewer_results_are_the_first_of_all(twins):
    ours, _ = twins(vocab_size=13)
    tokens, mask = prompts(13)
    options = {"mask": mask, "num_beams": 4, "max_new_tokens": NEW, "stop_ids": [1, 3], "pad_id": 12}
    every = beam_search(ours, tokens, num_return=4, **options)
    for n in (1, 2, 3):
        got = beam_search(ours, tokens, num_return=n, **options)
        assert torch.equal(got.tokens, every.tokens[:, :n, : got.tokens.shape[-1]])
        assert torch.equal(got.scores, every.scores[:, :n])


FILTERS = {  # transformers' name -> its setting, our filter
    "no_repeat_ngram_size": (2, no_repeat_ngram(2)),
    "repetition_penalty": (1.7, repetition_penalty(1.7)),
    "min_new_tokens": (5, min_new_tokens(5, [1])),
    "forced_eos_token_id": (7, forced_last(7, NEW)),
}


@pytest.mark.parametrize("names", [*((name,) for name in FILTERS), tuple(FILTERS)])
def test_filters_are_transformers(twins, names):
    """In both searches. All together act in transformers' order, which is that of the table."""
    settings, filters = {name: FILTERS[name][0] for name in names}, [FILTERS[name][1] for name in names]
    ours, theirs = twins(vocab_size=13)
    tokens, mask = prompts(13)
    ours_only = {"mask": mask, "stop_ids": [1], "pad_id": 12, "max_new_tokens": NEW}
    want = theirs.generate(
        tokens,
        attention_mask=mask.long(),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=12,
        **settings,
    )[:, T:]
    got = generate_tokens(ours, tokens, filters=filters, **ours_only)
    assert torch.equal(got, want)
    changed = got.tolist() != generate_tokens(ours, tokens, **ours_only).tolist()

    both = {"num_beams": 4, "num_return": 3, "stop_ids": [1], "pad_id": 12, "max_new_tokens": NEW}
    found = beam_search(ours, tokens, mask=mask, filters=filters, **both)
    assert_same(found, theirs_search(theirs, tokens, mask, **both, **settings))
    assert changed or found.tokens.tolist() != beam_search(ours, tokens, mask=mask, **both).tokens.tolist()


@pytest.mark.parametrize("stop_ids", [[], [2], [0, 2]])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_with_enough_beams_it_is_exhaustive(twins, stop_ids, length_penalty):
    """V ** (steps - 1) beams drop nothing, so the n best are those of all continuations, scored in float64.

    With two of four tokens that stop there are only 2 + 2 * 2 + 4 * 2 + 8 * 4 = 46 continuations.
    """
    vocab_size, steps = 4, 4
    ours, _ = twins(vocab_size=vocab_size)
    prompt = torch.tensor([[1, 3, 0]])
    got = beam_search(
        ours,
        prompt,
        num_beams=46 if len(stop_ids) == 2 else vocab_size ** (steps - 1),
        max_new_tokens=steps,
        stop_ids=stop_ids,
        length_penalty=length_penalty,
        early_stopping="never",
        num_return=10,
        pad_id=-1,
    )
    every = every_continuation(ours.double(), prompt, steps, stop_ids, length_penalty)[:10]
    assert [tuple(i for i in row if i >= 0) for row in got.tokens[0].tolist()] == [tokens for _, tokens in every]
    torch.testing.assert_close(got.scores[0].double(), torch.tensor([s for s, _ in every]).double(), atol=1e-5, rtol=0)


@torch.no_grad()
def every_continuation(model, prompt, steps, stop_ids, length_penalty):
    """(score, tokens) of all continuations, best first, by uncached passes, one batch of them all."""
    every = torch.tensor(list(itertools.product(range(model.config.vocab_size), repeat=steps)))
    log_probs = model(torch.cat([prompt.expand(len(every), -1), every], dim=1)).log_softmax(-1)
    each = log_probs[:, prompt.shape[1] - 1 : -1].gather(-1, every[:, :, None])[:, :, 0]  # of each token of each
    found = {}
    for ids, log_prob in zip(every.tolist(), each, strict=True):
        length = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), steps)
        found[tuple(ids[:length])] = log_prob[:length].sum().item() / length**length_penalty
    return sorted(((score, ids) for ids, score in found.items()), reverse=True)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("stop_ids", [[], [3, 5]])
def test_one_beam_is_greedy(twins, stop_ids, early_stopping):
    ours, _ = twins(vocab_size=13)
    tokens, mask = prompts(13)
    want = generate_tokens(ours, tokens, mask=mask, max_new_tokens=NEW, stop_ids=stop_ids)
    options = {"mask": mask, "max_new_tokens": NEW, "stop_ids": stop_ids, "early_stopping": early_stopping}
    assert torch.equal(beam_search(ours, tokens, num_beams=1, **options).tokens[:, 0], want)


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("kind", ["growing", "static", "prefix of 1 row", "prefix of 3 rows"])
def test_scores_are_those_of_uncached_passes(positions, kind):
    """Each hypothesis, run as a whole without padding: its score is the sum of its tokens' log-probabilities / length.

    It must hold for a cache with a learned prefix, too, which is not among the tokens.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = build(ModelConfig(positions=positions, max_positions=40, init_std=0.4, **sizes)).eval()
    tokens, mask = prompts(17)
    prefix = torch.randn(2, 2, int(kind[10]), 2, 4, 6) if kind.startswith("prefix") else None  # layer, key or value, ..

    def new_cache(row=None):
        if prefix is None:
            return static_cache(model, 3, T + NEW) if kind == "static" and row is None else None
        own = slice(row, row + 1) if row is not None and prefix.shape[2] > 1 else slice(None)
        return [KVCache((k[own], v[own])) for k, v in prefix]

    got = beam_search(
        model, tokens, mask=mask, num_beams=4, num_return=4, max_new_tokens=NEW, stop_ids=[5], cache=new_cache()
    )
    for row in range(3):
        real = tokens[row : row + 1, mask[row]]
        for ids, score in zip(got.tokens[row].tolist(), got.scores[row], strict=True):
            ids = ids[: ids.index(5) + 1] if 5 in ids else ids
            whole = torch.cat([real, torch.tensor([ids])], dim=1)
            with torch.no_grad():
                log_probs = model(whole, cache=new_cache(row)).log_softmax(-1)[0, real.shape[1] - 1 : -1]
            want = log_probs.gather(1, torch.tensor(ids)[:, None]).mean()
            torch.testing.assert_close(score, want, atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(twins):
    """Nor does it count as something said before."""
    ours, _ = twins(vocab_size=13)
    tokens, mask = prompts(13)
    options = {"mask": mask, "num_beams": 3, "max_new_tokens": 6, "filters": [no_repeat_ngram(1)]}
    want = beam_search(ours, tokens, **options)
    for filler in (3, 7):
        got = beam_search(ours, tokens.masked_fill(~mask, filler), **options)
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.scores, want.scores)
    assert all(len(set(ids)) == 6 for ids in want.tokens[:, 0].tolist())


# ---- what it costs, and what it leaves behind


def test_the_prompt_is_computed_once_on_its_own_rows(twins):
    ours, _ = twins()
    tokens, mask = prompts(61)
    seen = []
    ours.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[:2])))
    beam_search(ours, tokens, mask=mask, num_beams=4, max_new_tokens=4)
    assert seen == [(3, T), (12, 1), (12, 1), (12, 1)]


def test_it_ends_when_every_row_has(twins):
    """Every token but one stops, so with early stopping two beams are full after at most two steps."""
    ours, _ = twins(vocab_size=5)
    seen = []
    ours.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    beam_search(
        ours, prompts(5)[0], num_beams=2, max_new_tokens=NEW, stop_ids=[0, 1, 2, 3], early_stopping=True, pad_id=4
    )
    assert len(seen) <= 2


def test_caches_are_copied_only_when_rows_move(twins, monkeypatch):
    ours, _ = twins()
    copies, reorder = [], KVCache.reorder
    monkeypatch.setattr(KVCache, "reorder", lambda self, rows: (copies.append(rows.tolist()), reorder(self, rows)))
    beam_search(ours, prompts(61)[0], num_beams=1, max_new_tokens=NEW)
    assert copies == []
    beam_search(ours, prompts(61)[0], num_beams=2, max_new_tokens=NEW)
    assert copies[0] == [0, 0, 1, 1, 2, 2] and all(rows != [0, 1, 2, 3, 4, 5] for rows in copies)


def test_the_model_is_left_as_it_was(twins):
    ours, _ = twins(dropout=0.5)
    tokens, _ = prompts(61)
    want = beam_search(ours.eval(), tokens, num_beams=3, max_new_tokens=NEW)
    ours.train()
    ours.layers[0].eval()  # a mixture must come back as a mixture
    modes = {name: module.training for name, module in ours.named_modules()}
    memory = {name: (p.data_ptr(), p.stride(), p._version) for name, p in ours.named_parameters()}
    got = beam_search(ours, tokens, num_beams=3, max_new_tokens=NEW)
    assert torch.equal(got.tokens, want.tokens)  # no dropout
    assert modes == {name: module.training for name, module in ours.named_modules()}
    assert memory == {name: (p.data_ptr(), p.stride(), p._version) for name, p in ours.named_parameters()}
    (ours(got.tokens[:, 0]).logsumexp(-1)[:, 0] * got.scores[:, 0]).sum().backward()  # no inference tensors: may train
    assert ours.embed_tokens.weight.grad is not None


# ---- bad input


def refused(match, model, **options):
    with pytest.raises(ValueError, match=match):
        beam_search(model, **{"tokens": prompts(61)[0], "num_beams": 2, "max_new_tokens": 4, **options})


def test_everything_wrong_in_one_message(twins):
    ours, _ = twins()
    refused(
        r"(?s)cannot generate:.*max_new_tokens=0: must be at least 1.*token ids \[61\] are outside the vocabulary 0\.\."
        r"60.*stop_ids \[99\] are outside.*pad prompts on the left.*num_return=3: must be from 1 to num_beams=2.*"
        r"length_penalty=nan: must be a number from -10 to 10.*early_stopping='no': must be True, False or 'never'",
        ours,
        tokens=torch.tensor([[3, 61]]),
        mask=torch.tensor([[True, False]]),
        max_new_tokens=0,
        stop_ids=[99],
        num_return=3,
        length_penalty=math.nan,
        early_stopping="no",
    )


@pytest.mark.parametrize("num_beams", [0, -1])
def test_no_beams(twins, num_beams):
    refused(rf"num_beams={num_beams}: must be at least 1", twins()[0], num_beams=num_beams)


@pytest.mark.parametrize("num_return", [0, 3])
def test_more_results_than_beams(twins, num_return):
    refused(rf"num_return={num_return}: must be from 1 to num_beams=2", twins()[0], num_return=num_return)


@pytest.mark.parametrize(
    "steps, stop_ids, possible",
    [
        (1, [], 3),
        (2, [], 9),  # 3 * 3
        (2, [0], 7),  # 1 that stops at once, 2 * 3 others
        (3, [0, 1], 7),  # 2 + 1 * 2 + 1 * 1 * 3
        (3, [0, 1, 2], 3),
    ],
)
def test_more_beams_than_there_are_continuations(twins, steps, stop_ids, possible):
    """Counted by hand; with exactly as many beams every continuation comes out."""
    ours, _ = twins(vocab_size=3)
    options = {"tokens": torch.tensor([[1, 2]]), "max_new_tokens": steps, "stop_ids": stop_ids, "pad_id": -1}
    refused(
        rf"num_beams={possible + 1}: 3 token ids make only {possible} cont", ours, num_beams=possible + 1, **options
    )
    got = beam_search(ours, **options, num_beams=possible, num_return=possible, early_stopping="never")
    assert len({tuple(ids) for ids in got.tokens[0].tolist()}) == possible and got.scores.isfinite().all()


def test_filters_that_leave_too_little(twins):
    ours, _ = twins(vocab_size=3)
    tokens = torch.tensor([[1]])
    options = {"num_beams": 3, "max_new_tokens": 5, "stop_ids": [0, 1], "filters": [no_repeat_ngram(1)]}
    got = beam_search(ours, tokens, num_return=2, **options)
    assert sorted(map(tuple, got.tokens[0].tolist())) == [
        (0, 0),
        (2, 0),
    ]  # 1 was said; 0 ends
    with pytest.raises(ValueError, match=r"leave row\(s\) \[0\] fewer than num_return=3 continuations"):
        beam_search(ours, tokens, num_return=3, **options)
    with pytest.raises(ValueError, match=r"fewer than num_return=1"):
        beam_search(ours, tokens, **{**options, "filters": [min_new_tokens(9, [0, 1, 2])]})


def test_broken_weights_are_named(twins):
    ours, _ = twins()
    ours.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    with pytest.raises(ValueError, match=r"(?s)logits of row\(s\) \[0, 1, 2\] are not fin.*is layers\.1\.mlp\.up_proj"):
        beam_search(ours, prompts(61)[0], num_beams=2, max_new_tokens=2)
