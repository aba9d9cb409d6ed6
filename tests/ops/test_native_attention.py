"""Our attention kernels on the processor against the definition in float64, over all that they promise to take."""

import itertools

import pytest
import torch

from minillm import ops

pytestmark = pytest.mark.usefixtures("native_library")

SHAPES = {  # B, H, G, T, S, K
    "one of all": (1, 1, 1, 1, 1, 16),
    "decode": (2, 4, 2, 1, 1100, 64),  # more than one piece of the cache
    "decode, one key head": (1, 8, 1, 1, 65, 40),
    "decode, eight key heads": (2, 8, 8, 1, 33, 16),
    "few queries": (2, 8, 2, 2, 1030, 128),
    "odd sizes": (2, 4, 2, 5, 9, 7),
    "over tiles": (1, 4, 1, 70, 139, 64),  # the window of 7 begins with the last key of a tile
    "new positions": (2, 2, 2, 130, 200, 33),
    "wide heads": (1, 2, 1, 64, 64, 256),
    "groups of eight": (1, 8, 1, 19, 100, 24),
}
SEEN = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "window and prefix": {"causal": True, "window": 7, "prefix": 3},
}
PADDING = ("none", "left", "right", "holes")


def inputs(shape, dtype=torch.float32, layout="heads side by side"):
    B, H, G, T, S, K = shape
    torch.manual_seed(3)
    q, k, v = (torch.randn(B, rows, heads, K, dtype=torch.float32) for heads, rows in ((H, T), (G, S), (G, S)))
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    if layout == "rows apart":  # as a cache that has room for more
        k, v = (torch.cat([x, x], dim=2)[:, :, :S] for x in (k.contiguous(), v.contiguous()))
    return q, k, v


def padding(kind, B, S):
    if kind == "none":
        return None
    keep = torch.ones(B, 1, 1, S, dtype=torch.bool)
    if kind == "left":
        keep[0, ..., : S // 2] = False
    elif kind == "right":
        keep[-1, ..., S // 3 :] = False
    else:
        keep = torch.rand(B, 1, 1, S) > 0.5
        keep[0] = False  # a row in which nothing is seen
    return keep


def definition(q, k, v, **kwargs):
    with ops.use_backend("reference"):
        return ops.attention(q.double(), k.double(), v.double(), **kwargs)


def native(q, k, v, **kwargs):
    with ops.use_backend("native"):
        return ops.attention(q, k, v, **kwargs)


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("name", SHAPES)
def test_float32_outputs_and_gradients_are_those_of_the_definition(name, seen, kind):
    B, H, _, T, S, K = shape = SHAPES[name]
    q, k, v = (x.requires_grad_() for x in inputs(shape))
    kwargs = SEEN[seen] | {"mask": padding(kind, B, S), "scale": 1.3 / K**0.5}
    weight = torch.randn(B, H, T, K)
    y, expected = native(q, k, v, **kwargs), definition(q, k, v, **kwargs)
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-6)
    grads = torch.autograd.grad((y * weight).sum(), (q, k, v))
    for ours, theirs in zip(grads, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_errors_are_at_most_twice_those_of_torch(name, kind):
    """Of output and gradients, against the definition in float64 of the same rounded inputs."""
    B, S = SHAPES[name][0], SHAPES[name][4]
    q, k, v = (x.requires_grad_() for x in inputs(SHAPES[name], torch.bfloat16))
    kwargs = {"causal": True, "mask": padding(kind, B, S)}

    def results(y):
        return y, *torch.autograd.grad((y.float() * weight).sum(), (q, k, v))

    weight = torch.randn(q.shape)
    ours = results(native(q, k, v, **kwargs))
    theirs = results(ops.attention(q, k, v, **kwargs))
    for mine, torchs, true in zip(ours, theirs, results(definition(q, k, v, **kwargs)), strict=True):
        assert mine.dtype == torch.bfloat16 and mine.isfinite().all()
        allowed = 2 * (torchs.double() - true.double()).abs().max() + 2**-8 * true.abs().max() + 1e-6
        assert (mine.double() - true.double()).abs().max() <= allowed


@pytest.mark.parametrize("name", ["decode", "over tiles", "few queries"])
def test_strides_do_not_matter(name):
    q, k, v = inputs(SHAPES[name])
    expected = native(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    q, k, v = inputs(SHAPES[name], layout="rows apart")
    assert torch.equal(native(q, k, v, causal=True), expected)


@pytest.mark.parametrize("name", ["decode", "over tiles", "few queries"])
def test_the_number_of_threads_does_not_change_a_bit(name):
    q, k, v = (x.requires_grad_() for x in inputs(SHAPES[name]))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = native(q, k, v, causal=True)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_nothing_seen_reads_zero_with_zero_gradients():
    q, k, v = (x.requires_grad_() for x in inputs(SHAPES["over tiles"]))
    y = native(q, k, v, mask=torch.zeros(1, 1, 1, 139, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y))
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_large_scores_do_not_overflow():
    q, k, v = inputs(SHAPES["over tiles"])
    torch.testing.assert_close(native(200 * q, k, v).double(), definition(200 * q, k, v), rtol=1e-3, atol=1e-4)


def test_empty_sizes():
    q, k, v = inputs((2, 4, 2, 3, 5, 8))
    assert native(q[:0], k[:0], v[:0]).shape == (0, 4, 3, 8)
    assert native(q[:, :, :0], k, v).shape == (2, 4, 0, 8)
    assert not native(q, k[:, :, :0], v[:, :, :0]).any()


REFUSED = {
    "a bias on the scores": {"bias": torch.zeros(1, 1, 5, 9)},
    "dropout of attention weights": {"dropout": 0.1},
    "a mask of its own for each query or head": {"mask": torch.ones(2, 1, 5, 9, dtype=torch.bool)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_kernel_takes_is_told_and_left_to_torch(reason):
    q, k, v = inputs(SHAPES["odd sizes"])
    with pytest.raises(ValueError, match=f"attention: the native kernel cannot run this call: {reason}"):
        native(q, k, v, **REFUSED[reason])
    before = ops.OPS["attention"].refused[reason]
    with ops.use_backend("auto"):
        ops.attention(q, k, v, **REFUSED[reason])
        assert ops.OPS["attention"].refused[reason] == before + 1
        assert reason in ops.info()["attention"]["torch"]


def test_types_and_layouts_that_no_kernel_takes():
    q, k, v = inputs(SHAPES["odd sizes"])
    for tensors, reason in (
        ([x.double() for x in (q, k, v)], "kernels know float32 and bfloat16, not float64"),
        ([q.bfloat16(), k, v], "the tensors are of different types"),
        ([q.mT.contiguous().mT, k, v], "the features do not lie side by side"),
        ([q, k, v[..., :5]], "keys of 7 features and values of 5"),
    ):
        with pytest.raises(ValueError, match=reason):
            native(*tensors)
        with ops.use_backend("auto"):
            ops.attention(*[x.to(tensors[-1].dtype) for x in tensors])


def test_a_window_goes_with_causal():
    q, k, v = inputs(SHAPES["odd sizes"])
    for backend in ("reference", "torch", "native"):
        with ops.use_backend(backend), pytest.raises((ValueError, RuntimeError), match="goes with causal"):
            ops.attention(q, k, v, window=3)


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("name", ["odd sizes", "few queries"])
def test_torch_accepts_the_operations(name, differentiable):
    """Schema, shapes without data, gradients and tracing, as torch.library.opcheck examines them."""
    q, k, v = (x.requires_grad_(differentiable) for x in inputs(SHAPES[name]))
    keys = padding("left", len(q), k.shape[2])[:, 0, 0]
    for arguments in (
        (q, k, v, keys, True, 0, 0, 0.2),
        (q, k, v, None, True, 3, 1, 0.2),
        (q, k, v, None, False, 0, 0, 1.0),
    ):
        torch.library.opcheck(torch.ops.minillm.attention.default, arguments)
    o, lse = torch.ops.minillm.attention(q.detach(), k.detach(), v.detach(), keys, True, 0, 0, 0.2)
    plain = (o, q.detach(), k.detach(), v.detach(), o, lse, keys, True, 0, 0, 0.2)
    torch.library.opcheck(torch.ops.minillm.attention_backward.default, plain)


def test_lse_is_the_log_of_the_sum_of_exponentials():
    q, k, v = inputs(SHAPES["decode"])
    for queries in (q, q.expand(-1, -1, 40, -1)):
        _, lse = torch.ops.minillm.attention(queries, k, v, None, False, 0, 0, 0.3)
        scores = queries.double() @ k.double().repeat_interleave(2, 1).mT * 0.3
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_operation_itself_refuses_what_would_read_past_the_end():
    q, k, v = inputs(SHAPES["odd sizes"])
    run = torch.ops.minillm.attention
    for arguments in (
        (q, k[:, :, :4], v, None, False, 0, 0, 1.0),
        (q, k[..., :4], v, None, False, 0, 0, 1.0),
        (q[:1], k, v, None, False, 0, 0, 1.0),
        (q[:, :3], k, v, None, False, 0, 0, 1.0),
        (q, k.double(), v, None, False, 0, 0, 1.0),
        (q, k, v, torch.ones(2, 4, dtype=torch.bool), False, 0, 0, 1.0),
        (q, k, v, torch.ones(2, 9), False, 0, 0, 1.0),
        (q.mT.contiguous().mT, k, v, None, False, 0, 0, 1.0),
    ):
        with pytest.raises(RuntimeError, match="minillm kernels: "):
            run(*arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole():
    """torch.compile with fullgraph=True: forward and backward, no graph break."""
    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in inputs(SHAPES["odd sizes"]))
    mask = padding("right", 2, 9)
    table = ops.rotary_table(torch.arange(5), 7 - 1)

    def step(q, k, v):
        turned = torch.cat([ops.rope(q[..., :6].contiguous(), *table), q[..., 6:]], dim=-1)
        return ops.attention(turned, k, v, causal=True, mask=mask)

    with ops.use_backend("native"):
        expected = step(q, k, v)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
        torch.testing.assert_close(got, expected)
        ours, theirs = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (got, expected))
        for mine, other in itertools.zip_longest(ours, theirs):
            torch.testing.assert_close(mine, other)


def test_auto_leaves_small_calls_to_torch():
    """Where the way around the kernel costs more than it saves; counted, and "native" takes them all the same."""
    op, small = ops.OPS["attention"], inputs((1, 2, 1, 20, 20, 16))
    with ops.use_backend("auto"):
        assert not op.runs_natively(*small, causal=True)
        before = op.refused.total()
        ops.attention(*small, causal=True)
        assert op.refused.total() == before + 1
        long = inputs((1, 2, 1, 130, 130, 16))
        assert op.runs_natively(*long, causal=True)
        wanting = [x.requires_grad_() for x in long]
        assert op.runs_natively(*wanting, causal=True) and not op.runs_natively(*wanting)
        q, k, v = inputs((1, 2, 1, 1, 700, 16))
        assert op.runs_natively(q, k, v, causal=True)
        assert not op.runs_natively(q, k[:, :, :90], v[:, :, :90], causal=True)
    with ops.use_backend("native"):
        assert op.runs_natively(*small, causal=True)


@pytest.mark.parametrize("T", [1, 5])
def test_the_log_sum_exp_is_that_of_the_keys_seen_and_minus_infinity_of_none(T):
    q, k, v = inputs((2, 4, 2, T, 37, 24))
    keys = torch.rand(2, 37) > 0.5
    keys[0] = False
    _, lse = torch.ops.minillm.attention(q, k, v, keys, False, 0, 0, 0.3)
    scores = 0.3 * q.double() @ k.double().repeat_interleave(2, 1).mT
    expected = scores.masked_fill(~keys[:, None, None], -torch.inf).logsumexp(-1)
    assert expected[0].isneginf().all()
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)
