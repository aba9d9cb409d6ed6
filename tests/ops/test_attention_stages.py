"""Which calls a stage of the CUDA kernels of attention is asked for, and what is said of the others."""

import pytest
import torch

from minillm import ops
from minillm.ops import emulate, native_attention
from minillm.ops.build import obstacle

SHAPE = (2, 4, 6, 64)


def heads(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


TAKEN = {
    "side by side": heads(*SHAPE),
    "rows before heads": heads(2, 6, 4, 64).transpose(1, 2),
    "within a longer cache": heads(2, 4, 9, 72)[:, :, 2:8, :64],
    "80 features": heads(2, 4, 6, 80),
    "one of a batch": heads(1, 4, 6, 64),
}
REFUSED = {
    "float32": (heads(*SHAPE, dtype=torch.float32), "multiplies bfloat16, not float32"),
    "40 features": (heads(2, 4, 6, 40), "a multiple of 16 features, not 40"),
    "odd steps": (heads(2, 4, 6, 66)[..., :64], "its strides are"),
    "odd start": (heads(2, 4, 6, 72)[..., 1:65], "its strides are"),
    "one batch for all": (heads(1, 4, 6, 64).expand(2, -1, -1, -1), "its strides are"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_stage_5_takes(name, hopper):
    assert native_attention._not_for_hopper(*3 * [TAKEN[name]]) == ""


@pytest.mark.parametrize("name", REFUSED)
def test_stage_5_says_why_it_does_not_take(name, hopper):
    x, reason = REFUSED[name]
    whole = heads(*x.shape, dtype=x.dtype)
    for number, tensor in enumerate("qkv"):
        given = [x if number == n else whole for n in range(3)]
        found = native_attention._not_for_hopper(*given)
        assert reason in found and ("strides" not in reason or f"from {tensor} " in found)


def test_stage_5_is_for_hopper(monkeypatch):
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        reason = native_attention._not_for_hopper(*3 * [heads(*SHAPE)])
        assert reason == f"stage 5 is for GPUs of compute capability 9.0 (Hopper), not {capability[0]}.0"


@pytest.mark.skipif(bool(obstacle("emulated")), reason=obstacle("emulated"))
@pytest.mark.parametrize("name", TAKEN | REFUSED)
def test_the_kernel_itself_takes_and_refuses_the_same(name):
    """The launcher is the last to ask, whatever Python forgot."""
    if name in TAKEN:
        q = k = v = TAKEN[name]
        o, _ = emulate.attention(q, k, v, stage="v5", causal=True)
        with ops.use_backend("reference"):
            expected = ops.attention(*(x.double() for x in (q, k, v)), causal=True)
        torch.testing.assert_close(o.double(), expected, atol=2e-2, rtol=2e-2)
    else:
        x = REFUSED[name][0]
        whole = heads(*x.shape, dtype=x.dtype)
        for number in range(3):
            given = [x if number == n else whole for n in range(3)]
            with pytest.raises(ValueError, match="does not take this shape"):
                emulate.attention(*given, stage="v5")


def test_a_stage_that_is_not_there_is_refused():
    for stage in (-1, 6):
        with (
            pytest.raises(ValueError, match=f"stage={stage}: attention has the stages 1 to 5, and 0 for the best"),
            ops.use_attention_stage(stage),
        ):
            pass
    q = heads(*SHAPE)
    with ops.use_attention_stage(5):
        assert "stage 5 is one of the GPU's kernels" in native_attention._cannot(q, q, q)
