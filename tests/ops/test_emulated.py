"""The CUDA kernels of attention, run on the emulated GPU, against the formula in float64."""

import math
import re
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, ODD_SIZES, Case, check_backward, check_forward

from minillm.ops import emulate

FLOAT_STAGES = [(stage, dtype) for stage in ("v1", "v2") for dtype in (torch.float32, torch.bfloat16)]
MMA_STAGES = [(stage, torch.bfloat16) for stage in ("v3", "v4", "v5")]


def forward_runs():
    for number, (name, case) in enumerate((CASES | ODD_SIZES).items()):
        for stage, dtype in FLOAT_STAGES + MMA_STAGES * (name in CASES):
            schedule = emulate.SCHEDULES[number % 3]
            yield pytest.param(case, stage, dtype, schedule, id=f"{name}-{stage}-{str(dtype)[6:]}")


@pytest.mark.parametrize("case, stage, dtype, schedule", list(forward_runs()))
def test_forward_is_the_formula(case, stage, dtype, schedule):
    q, k, v, _ = case.tensors(dtype)
    machine = emulate.Machine(schedule=schedule, seed=case.S)
    o, lse = emulate.attention(q, k, v, stage=stage, keys=case.keys(), **case.rules(), machine=machine)
    assert o.dtype == dtype
    check_forward(case, q, k, v, o, lse)


@pytest.mark.parametrize("stage", emulate.STAGES)
def test_the_order_of_threads_does_not_matter(stage):
    case = CASES["everything"]
    q, k, v, _ = case.tensors(torch.bfloat16)
    answers = [
        emulate.attention(
            *(q, k, v),
            stage=stage,
            keys=case.keys(),
            **case.rules(),
            machine=emulate.Machine(schedule=order, seed=seed),
        )
        for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2))
    ]
    for o, lse in answers[1:]:
        assert torch.equal(o, answers[0][0]) and torch.equal(lse, answers[0][1])


def backward_runs():
    for number, (name, case) in enumerate((CASES | ODD_SIZES).items()):
        if case.size != 1:  # of such large scores the derivative is all rounding
            continue
        runs = [("v1", torch.float32), ("v1", torch.bfloat16)]
        runs += [("v2", torch.bfloat16)] * (case.K % 16 == 0 and case.K <= 128)
        for stage, dtype in runs:
            schedule = emulate.SCHEDULES[number % 3]
            yield pytest.param(case, stage, dtype, schedule, id=f"{name}-{stage}-{str(dtype)[6:]}")


@pytest.mark.parametrize("case, stage, dtype, schedule", list(backward_runs()))
def test_backward_is_the_derivative(case, stage, dtype, schedule):
    q, k, v, grad = case.tensors(dtype)
    machine = emulate.Machine(schedule=schedule, seed=case.S)
    given = {"keys": case.keys(), **case.rules()}
    o, lse = emulate.attention(q, k, v, **given)
    grads = emulate.attention_backward(grad, q, k, v, o, lse, stage=stage, machine=machine, **given)
    check_backward(case, q, k, v, grad, grads)


@pytest.mark.parametrize("splits", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(H=8, G=1, S=100, K=64),
        Case(B=2, H=6, G=2, S=130, K=128, padding="left", strided=True),
        Case(B=2, H=4, G=4, S=70, K=40, padding="all of a row"),
        Case(H=5, G=1, S=150, K=256, window=33, prefix=5, causal=False),
    ],
)
def test_decode_is_the_formula(case, dtype, splits):
    q, k, v, _ = case.tensors(dtype)
    machine = emulate.Machine(schedule=emulate.SCHEDULES[splits % 3])
    o, lse = emulate.attention_decode(q, k, v, splits=splits, keys=case.keys(), **case.rules(), machine=machine)
    check_forward(case, q, k, v, o, lse)


def test_tensor_core_stages_refuse_what_they_cannot_do():
    refused = {
        "features not a multiple of 16": Case(T=5, S=5, K=40).tensors(torch.bfloat16),
        "float32": Case(T=5, S=5, K=16).tensors(torch.float32),
        "rows that do not begin on 16 bytes": [x[..., 1:17] for x in Case(T=5, S=5, K=32).tensors(torch.bfloat16)],
    }
    for q, k, v, _ in refused.values():
        for stage in ("v3", "v4", "v5"):
            with pytest.raises(ValueError, match="does not take this shape"):
                emulate.attention(q, k, v, stage=stage)
        o, lse = emulate.attention(q, k, v, stage="v2")  # takes everything
        with pytest.raises(ValueError, match="does not take this shape"):
            emulate.attention_backward(o, q, k, v, o, lse, stage="v2")


def test_no_stage_takes_more_features_than_there_is_room_for():
    q, k, v, grad = Case(K=264).tensors(torch.float32)
    for stage in emulate.STAGES:
        with pytest.raises(ValueError, match="does not take this shape"):
            emulate.attention(q, k, v, stage=stage)
    for stage in emulate.BACKWARD_STAGES:
        with pytest.raises(ValueError, match="does not take this shape"):
            emulate.attention_backward(grad, q, k, v, q, torch.zeros(1, 1, 1), stage=stage)
    with pytest.raises(ValueError, match="does not take this shape"):
        emulate.attention_decode(q, k, v)


@pytest.mark.parametrize("B, T, S", [(0, 3, 3), (1, 0, 3)])
def test_no_query_is_no_work(B, T, S):
    q, k, v, _ = Case(B=B, T=T, S=S).tensors(torch.float32)
    for stage in ("v1", "v2"):
        o, lse = emulate.attention(q, k, v, stage=stage)
        assert o.shape == q.shape and lse.shape == (B, 1, T)


@pytest.mark.parametrize("stage", emulate.STAGES)
def test_no_key_reads_zero(stage):
    q, k, v, _ = replace(CASES["one"], T=3, S=0).tensors(torch.bfloat16)
    o, lse = emulate.attention(q, k, v, stage=stage)
    assert (o == 0).all() and (lse == -math.inf).all()


def bytes_read(stage, case, **rules) -> int:
    q, k, v, _ = case.tensors(torch.bfloat16)
    machine = emulate.Machine()
    emulate.attention(q, k, v, stage=stage, keys=case.keys(), **case.rules() | rules, machine=machine)
    return machine.counts.global_read


def test_bytes_are_those_of_the_algorithm():
    """64 queries, 128 keys of 32 bfloat16, not causal: v1 reads two rows for a score and one for a value; v2's four
    blocks of 16 queries read every key and value once, v3 to v5 have one block."""
    case = Case(T=64, S=128, K=32, causal=False)
    row = 2 * 32
    assert bytes_read("v1", case) == 64 * 128 * (2 * 2 + 1) * row
    assert bytes_read("v2", case) == 64 * row + 4 * 2 * 128 * row
    assert {bytes_read(stage, case) for stage in ("v3", "v4", "v5")} == {64 * row + 2 * 128 * row}


@pytest.mark.parametrize("stage, tile", [("v2", 32), ("v3", 64), ("v4", 64), ("v5", 128)])
def test_tiles_that_nobody_sees_are_not_read(stage, tile):
    row = 2 * 2 * 32  # key and value

    def tiles(**rules):
        """How many tiles of keys one query's block reads."""
        case = Case(T=1, S=4 * tile, K=32, **rules)
        warps = 9 if stage == "v5" else 4  # each reads the mask
        mask = warps * case.S if case.padding else 0
        return (bytes_read(stage, case) - 2 * 32 - mask) / (tile * row)

    assert tiles() == 4
    assert tiles(window=3) == 1
    assert tiles(window=3, prefix=2) == 2
    assert tiles(padding="tiles") == 2
    first = Case(T=tile * 4, S=tile * 4, K=32)
    queries = {"v2": 16, "v5": 128}.get(stage, 64)
    seen = sum(math.ceil((block + 1) * queries / tile) for block in range(tile * 4 // queries))
    assert bytes_read(stage, first) == 4 * tile * 2 * 32 + seen * tile * row


@pytest.mark.parametrize("features", [32, 64, 128, 256])
def test_the_swizzle_leaves_no_bank_conflict(features):
    q, k, v, _ = Case(T=64, S=64, K=features).tensors(torch.bfloat16)
    machine = emulate.Machine()
    emulate.attention(q, k, v, stage="v4", machine=machine)
    assert machine.counts.conflicts == 0


def test_bad_tensors_are_refused():
    q, k, v, _ = CASES["short"].tensors(torch.float32)
    with pytest.raises(ValueError, match="should all be float32 or all bfloat16"):
        emulate.attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="features lie side by side"):
        emulate.attention(q.mT.contiguous().mT, k, v)
    with pytest.raises(ValueError, match="no stage 'v9': choose one of v1, v2, v3, v4, v5"):
        emulate.attention(q, k, v, stage="v9")
    with pytest.raises(ValueError, match="no schedule 'random': choose one of forward, reverse, shuffled"):
        emulate.attention(q, k, v, machine=emulate.Machine(schedule="random"))
    with pytest.raises(ValueError, match="queries should be 1 to keys"):
        emulate.trace(queries=5, keys=4)


def test_no_query_leaves_no_gradient():
    for stage in emulate.BACKWARD_STAGES:
        q, k, v, grad = Case(T=0, S=3).tensors(torch.bfloat16)
        grads = emulate.attention_backward(grad, q, k, v, q, torch.empty(1, 1, 0), stage=stage)
        assert all((x == 0).all() for x in grads[1:])
        q, k, v, grad = Case(T=3, S=0).tensors(torch.bfloat16)
        grads = emulate.attention_backward(grad, q, k, v, q, torch.zeros(1, 1, 3), stage=stage)
        assert (grads[0] == 0).all()
    o, lse = emulate.attention_decode(*Case(T=1, S=0).tensors(torch.bfloat16)[:3])
    assert (o == 0).all() and (lse == -math.inf).all()


def test_a_trace_tells_what_a_mutant_breaks():
    assert "error: race: thread" in emulate.trace("v2", mutant=202)
    wrong = emulate.trace("v2", mutant=11)  # sees the future
    assert float(wrong.split()[-1]) > 0.1 > float(emulate.trace("v2").split()[-1])


@pytest.mark.parametrize("stage", emulate.STAGES)
def test_a_trace_tells_what_a_block_does(stage):
    text = emulate.trace(stage, queries=20, keys=40)
    assert text.startswith(f"attention {stage}: 20 queries, 40 keys")
    barriers = len(re.findall(rf"barrier attention_{stage}\.cu:\d+", text))
    assert barriers == {"v1": 0, "v2": 4, "v3": 2, "v4": 1, "v5": 5}[stage]
    assert ("all of this tile is there" in text) == (stage in ("v2", "v3"))
    assert "q, k and v have 6,400, o and lse 1,360" in text  # 20 and 2 x 40 rows of 64 bytes; 20 of 64 + 4
