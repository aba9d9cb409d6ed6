"""Our CUDA kernels on a real GPU, against the formula in float64. Skipped where there is no GPU or no nvcc.

The same cases run on the emulated GPU wherever there is a C++ compiler: tests/ops/test_emulated.py.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, ODD_SIZES, Case, check_backward, check_forward

from minillm import ops
from minillm.generation import generate_tokens
from minillm.models import ModelConfig, build

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("cuda_kernels"),
]
STAGES = (0, 1, 2, 3, 4, 5)
ONLY_BFLOAT16 = (3, 4, 5)
HOPPER = (9, 0)


def runs():
    for name, case in (CASES | ODD_SIZES).items():
        for dtype in (torch.float32, torch.bfloat16):
            for stage in STAGES:
                if stage not in ONLY_BFLOAT16 or (dtype == torch.bfloat16 and name in CASES):
                    yield pytest.param(case, dtype, stage, id=f"{name}-{str(dtype)[6:]}-{stage}")


def arguments(case: Case, *tensors: torch.Tensor) -> tuple:
    keys, scale = case.keys(), case.scale or case.K**-0.5
    keys = None if keys is None else keys.to(DEVICE)
    return *(x.to(DEVICE) for x in tensors), keys, case.causal, case.window, case.prefix, scale


def rules(case: Case) -> bool:
    return not case.window or case.causal  # the operation refuses a window without causal


@pytest.mark.parametrize(("case", "dtype", "stage"), [run for run in runs() if rules(run.values[0])])
def test_forward_is_the_formula(case, dtype, stage):
    if stage == 5 and torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("stage 5 is for Hopper")
    q, k, v, _ = case.tensors(dtype)
    o, lse = torch.ops.minillm.attention(*arguments(case, q, k, v), stage)
    check_forward(case, q, k, v, o.cpu(), lse.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n, c in (CASES | ODD_SIZES).items() if rules(c) and c.size == 1])
def test_backward_is_the_derivative_and_has_the_same_bits_each_time(name, dtype):
    case = (CASES | ODD_SIZES)[name]
    q, k, v, grad = case.tensors(dtype)
    o, lse = torch.ops.minillm.attention(*arguments(case, q, k, v))
    twice = [
        torch.ops.minillm.attention_backward(grad.to(DEVICE), *given) for given in 2 * [backward(case, q, k, v, o, lse)]
    ]
    assert all(torch.equal(one, two) for one, two in zip(*twice, strict=True))
    check_backward(case, q, k, v, grad, [g.cpu() for g in twice[0]])


def backward(case, q, k, v, o, lse):
    q, k, v, *rest = arguments(case, q, k, v)
    return q, k, v, o, lse, *rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (6, 1)])
def test_decoding_over_a_long_cache(heads, dtype):
    """Long enough to be split over many blocks."""
    H, G = heads
    case = Case(B=3, H=H, G=G, T=1, S=3001, K=64, padding="left", strided=True)
    q, k, v, _ = case.tensors(dtype)
    o, lse = torch.ops.minillm.attention(*arguments(case, q, k, v))
    check_forward(case, q, k, v, o.cpu(), lse.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_the_definition(dtype):
    x = torch.randn(2, 7, 3, 34).to(dtype).transpose(1, 2)
    cos, sin = ops.rotary_table(torch.randint(0, 99, (2, 7)), 34)
    with ops.use_backend("reference"):
        expected = ops.rope(x, cos, sin)
    y = torch.ops.minillm.rope(*(t.to(DEVICE) for t in (x, cos, sin)))
    torch.testing.assert_close(y.cpu(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_and_its_tokens_are_those_of_torch(stage):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=128)
    model = build(ModelConfig(**sizes, init_std=0.1)).to(DEVICE)
    tokens, mask = torch.randint(2, 61, (3, 12), device=DEVICE), torch.ones(3, 12, dtype=torch.bool, device=DEVICE)
    mask[0, :7] = False
    results = {}
    for backend in ("native", "torch"):
        with ops.use_backend(backend), ops.use_attention_stage(stage if backend == "native" else 0):
            logits = model(tokens, mask=mask)[mask]
            grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            results[backend] = logits, *grads
            results[backend + " tokens"] = generate_tokens(model.eval(), tokens, mask=mask, max_new_tokens=40)
    for ours, theirs in zip(results["native"], results["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert torch.equal(results["native tokens"], results["torch tokens"])


def test_a_stage_that_cannot_take_a_call_says_so():
    q = torch.randn(1, 1, 4, 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="attention: stage 3 does not take these shapes or types"):
        torch.ops.minillm.attention(q, q, q, None, True, 0, 0, 1.0, 3)


@pytest.mark.parametrize("case", [Case(B=2, H=16, G=4, T=1000, S=1500, K=128), Case(H=4, G=4, T=900, S=900, K=64)])
@pytest.mark.parametrize("causal", [True, False])
def test_hopper_agrees_with_the_stage_before_on_long_rows(case, causal):
    """Many blocks at once and many turns of each buffer, which the emulated GPU is too slow for."""
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("stage 5 is for Hopper")
    case = replace(case, causal=causal)
    given = arguments(case, *case.tensors(torch.bfloat16)[:3])
    for _ in range(5):
        (o, lse), (expected, exact) = (torch.ops.minillm.attention(*given, stage) for stage in (5, 4))
        torch.testing.assert_close(o, expected, rtol=2**-7, atol=2**-9)
        torch.testing.assert_close(lse, exact, rtol=1e-5, atol=1e-5)
