"""KVCache and StaticKVCache against plain concatenation."""

import pytest
import torch

from minillm.layers.cache import KVCache, MemoryCache, StaticKVCache

B, G, K = 2, 3, 4


def pieces(*lengths, batch=B, seed=0):
    """Keys and values for consecutive steps of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, G, t, K, generator=generator), torch.randn(batch, G, t, K, generator=generator))
        for t in lengths
    ]


def joined(steps):
    return torch.cat([k for k, _ in steps], dim=2), torch.cat([v for _, v in steps], dim=2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (5,), (1, 1, 1, 1, 1, 1, 1), (5, 1, 3, 1, 1, 9)])
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_update_returns_everything_so_far(kind, lengths, grad):
    cache = KVCache() if kind == "growing" else StaticKVCache(B, G, sum(lengths), K)
    steps = pieces(*lengths)
    with torch.set_grad_enabled(grad):
        for i, (k, v) in enumerate(steps):
            for got, want in zip(cache.update(k, v), joined(steps[: i + 1]), strict=True):
                assert torch.equal(got, want)
            assert cache.offset == cache.length == sum(lengths[: i + 1])


def test_grad_mode_may_change_between_updates():
    cache, steps = KVCache(), pieces(3, 1, 1, 2, 1)
    for i, (k, v) in enumerate(steps):
        with torch.set_grad_enabled(i % 2 == 0):
            got = cache.update(k, v)
    assert all(torch.equal(a, b) for a, b in zip(got, joined(steps), strict=True))


@torch.no_grad()
def test_the_callers_tensors_are_never_written_into():
    steps = pieces(3, 1, 1, 1)
    prefix = pieces(2, seed=1)[0]
    before = [x.clone() for pair in [prefix, *steps] for x in pair]
    plain, prefixed = KVCache(), KVCache(prefix)
    for k, v in steps:
        plain.update(k, v)
        prefixed.update(k, v)
    assert all(torch.equal(a, b) for a, b in zip(before, [x for pair in [prefix, *steps] for x in pair], strict=True))


@torch.no_grad()
def test_growing_allocates_seldom():
    cache, addresses = KVCache(), set()
    for k, v in pieces(*[1] * 100):
        cache.update(k, v)
        addresses.add((cache.keys.data_ptr(), cache.keys.shape[2]))
    assert len(addresses) <= 8  # 1, then 4, 10, 22, 46, 94, 190 positions


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, B])
def test_prefix_stands_first_and_has_no_position(rows, grad):
    prefix, steps = pieces(2, batch=rows, seed=1)[0], pieces(3, 1)
    cache = KVCache(prefix)
    assert (cache.offset, cache.length) == (0, 2)
    with torch.set_grad_enabled(grad):
        for k, v in steps:
            keys, values = cache.update(k, v)
    want_keys, want_values = joined([tuple(x.expand(B, -1, -1, -1) for x in prefix), *steps])
    assert torch.equal(keys, want_keys) and torch.equal(values, want_values)
    assert (cache.offset, cache.length) == (4, 6)


def test_loss_reaches_prefix_and_every_step():
    prefix = tuple(x.requires_grad_() for x in pieces(2, batch=1, seed=1)[0])
    steps = [(k.requires_grad_(), v.requires_grad_()) for k, v in pieces(3, 1, 1)]
    cache, loss = KVCache(prefix), 0.0
    for k, v in steps:
        keys, values = cache.update(k, v)
        loss = loss + (keys**2).sum() + (values**2).sum()  # each step's result is saved for the backward pass
    loss.backward()
    times_seen = [3, 2, 1]
    for seen, (k, v) in zip(times_seen, steps, strict=True):
        torch.testing.assert_close(k.grad, 2 * seen * k.detach())
        torch.testing.assert_close(v.grad, 2 * seen * v.detach())
    for x in prefix:  # one prefix serves B rows in 3 steps
        torch.testing.assert_close(x.grad, 2 * 3 * B * x.detach())


def test_prefix_takes_the_precision_of_the_keys():
    k, v = (x.bfloat16() for x in pieces(3)[0])
    keys, _ = KVCache(pieces(2, seed=1)[0]).update(k, v)
    assert keys.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [1], [1, 1, 0, 1]])
@pytest.mark.parametrize("kind", ["growing", "static", "prefix"])
@torch.no_grad()
def test_reorder_then_continue(kind, rows):
    rows, steps = torch.tensor(rows), pieces(3, 1)
    cache = {
        "growing": KVCache,
        "static": lambda: StaticKVCache(B, G, 6, K),
        "prefix": lambda: KVCache(pieces(2, seed=1)[0]),
    }[kind]()
    for k, v in steps:
        before = cache.update(k, v)
    cache.reorder(rows)
    (k, v) = pieces(1, batch=len(rows), seed=2)[0]
    for got, old, new in zip(cache.update(k, v), before, (k, v), strict=True):
        assert torch.equal(got, torch.cat([old[rows], new], dim=2))


def test_reorder_of_an_empty_cache_does_nothing():
    cache = KVCache()
    cache.reorder(torch.tensor([1, 0]))
    assert cache.offset == 0 and cache.update(*pieces(2)[0])[0].shape[2] == 2


@torch.no_grad()
def test_static_cache_overflow_says_capacity_and_need():
    cache = StaticKVCache(B, G, 4, K)
    cache.update(*pieces(3)[0])
    with pytest.raises(ValueError, match=r"full: 3 of 4 positions are used and 2 more .* max_length >= 5"):
        cache.update(*pieces(2)[0])
    assert cache.offset == 3  # the failed update left nothing behind
    cache.update(*pieces(1)[0])


def test_static_cache_refuses_gradients():
    k, v = pieces(1)[0]
    with pytest.raises(ValueError, match=r"no gradient can pass: use torch.no_grad\(\)"):
        StaticKVCache(B, G, 4, K).update(k.requires_grad_(), v)


@pytest.mark.parametrize("make", [KVCache, lambda: StaticKVCache(B, G, 9, K)])
@torch.no_grad()
def test_keys_of_another_batch_are_refused(make):
    cache = make()
    cache.update(*pieces(3)[0])
    with pytest.raises(ValueError, match=r"(?s)does not fit.*cached: batch 2.*given:  batch 5.*new ones for"):
        cache.update(*pieces(1, batch=5)[0])


def test_static_cache_memory_is_what_was_asked_for():
    cache = StaticKVCache(B, G, 7, K, dtype=torch.bfloat16, device="cpu")
    assert cache.keys.shape == cache.values.shape == (B, G, 7, K)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16


def test_a_memory_is_filled_once_and_reordered_with_its_mask():
    memory, (k, v) = MemoryCache(), pieces(5)[0]
    memory.reorder(torch.tensor([1, 0]))
    assert not memory.filled  # there was nothing to reorder
    mask = torch.rand(B, 1, 1, 5) > 0.5
    memory.fill(k, v, mask)
    rows = torch.tensor([1, 1, 0])
    memory.reorder(rows)
    assert memory.filled and torch.equal(memory.keys, k[rows]) and torch.equal(memory.values, v[rows])
    assert torch.equal(memory.mask, mask[rows])


@pytest.mark.parametrize("mask", [None, torch.tensor([[[[True, False, True]]]])])
def test_one_mask_for_all_rows_of_a_memory_stays(mask):
    memory, (k, v) = MemoryCache(), pieces(3)[0]
    memory.fill(k, v, mask)
    memory.reorder(torch.tensor([1, 0, 1]))
    assert memory.mask is mask and len(memory.keys) == 3


@pytest.mark.parametrize("make", [KVCache, lambda: StaticKVCache(B, G, 9, K)])
@torch.no_grad()
def test_reordering_a_cache_reorders_its_memory(make):
    cache, (k, v) = make(), pieces(4)[0]
    cache.memory.fill(k, v, None)
    cache.reorder(torch.tensor([1, 0]))
    assert torch.equal(cache.memory.keys, k.flip(0)) and torch.equal(cache.memory.values, v.flip(0))


@pytest.mark.parametrize("make", [KVCache, lambda: StaticKVCache(B, G, 4, K), lambda: KVCache(pieces(2, seed=3)[0])])
@torch.no_grad()
def test_prefixes_put_in_stand_before_all_that_is_there(make):
    """The last one put in comes first; a static cache keeps room for all its tokens."""
    cache, steps = make(), pieces(3, 1)
    given = [pieces(2, seed=3)[0]] if cache.prefix_length else []
    for owner, length in (("a", 1), ("b", 3)):
        k, v = (x[:1] for x in pieces(length, seed=length)[0])
        cache.prepend(owner, k, v)
        given = [(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)), *given]
    assert cache.owners == ("a", "b") and cache.offset == 0
    for i, (k, v) in enumerate(steps):
        for got, want in zip(cache.update(k, v), joined([*given, *steps[: i + 1]]), strict=True):
            assert torch.equal(got, want)
    assert cache.offset == 4 and cache.length == 4 + sum(k.shape[2] for k, _ in given)


def test_a_memory_joins_its_prefix_to_the_source_and_its_mask():
    memory, (k, v), (pk, pv) = MemoryCache(), pieces(5)[0], pieces(2, seed=1)[0]
    memory.prepend("a", pk[:1, :, :1], pv[:1, :, :1])
    memory.prepend("b", pk[:1, :, 1:], pv[:1, :, 1:])
    assert not memory.filled and memory.owners == ("a", "b")
    mask = torch.rand(B, 1, 1, 5) > 0.5
    memory.fill(k, v, mask)
    assert torch.equal(memory.keys, torch.cat([pk[:1].flip(2).expand(B, -1, -1, -1), k], 2))
    assert torch.equal(memory.values, torch.cat([pv[:1].flip(2).expand(B, -1, -1, -1), v], 2))
    assert memory.mask[..., :2].all() and torch.equal(memory.mask[..., 2:], mask)


@pytest.mark.parametrize("cache, what", [(KVCache(), "3 tokens were read"), (MemoryCache(), "a source was read")])
@torch.no_grad()
def test_a_prefix_that_comes_too_late_is_refused(cache, what):
    k, v = pieces(3)[0]
    cache.fill(k, v, None) if isinstance(cache, MemoryCache) else cache.update(k, v)
    with pytest.raises(ValueError, match=f"{what} without it; use new caches"):
        cache.prepend("a", k[:1], v[:1])
