"""Our CUDA kernels of low-rank adapters on a real GPU, against the formula in float64. Skipped where there is no GPU.

The same calls run on the emulated GPU wherever there is a C++ compiler: tests/ops/test_emulated_binding.py.
"""

import jaxtyping
import pytest
import torch
from lora_cases import CASES, DROPOUTS, MIXED, TYPES, Case, Mixed, check_linear, check_mixed, close

from minillm import ops
from minillm.generation import generate_tokens
from minillm.models import ModelConfig, build
from minillm.peft import LoraConfig, LoRALinear, activate, rows, tune

DEVICE = "cuda"
SEED = torch.tensor(2**40 + 77)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("cuda_kernels"),
]
EVERY_TYPE = pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
LARGE = {  # more than one block of everything
    "training": Case((2048,), 1024, 768, 16),
    "rank 64": Case((3, 333), 520, 264, 64),
    "odd sizes": Case((1111,), 515, 771, 7),
}
LARGE_MIXED = {
    "decoding": Mixed((3, 0, -1, 2, 1) * 13, 1, 1024, 2048),
    "prompts": Mixed((3, 0, -1, 2), 257, 512, 768),
}


@EVERY_TYPE
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE.values()], ids=[*CASES, *(f"large {name}" for name in LARGE)])
def test_one_adapter(case, dropout, types):
    check_linear(case, types, dropout, DEVICE)


@EVERY_TYPE
@pytest.mark.parametrize(
    "case", [*MIXED.values(), *LARGE_MIXED.values()], ids=[*MIXED, *(f"large {n}" for n in LARGE_MIXED)]
)
def test_mixed_batches(case, types):
    check_mixed(case, types, DEVICE)


@EVERY_TYPE
@pytest.mark.parametrize("stage", [1, 3, 4])
def test_each_stage(stage, types):
    """Of one adapter's update: stage 4 is for bfloat16 alone."""
    case = LARGE["training"]
    (x, _, _, a, b), _ = case.tensors(*types, DEVICE)
    y = torch.randn(2048, case.Dout, device=DEVICE).to(x.dtype)
    call = (y, x.detach(), a.detach(), b.detach(), case.scale, 0.1, SEED, stage)
    if stage == 4 and types[1] == torch.float32:
        with pytest.raises(RuntimeError, match="lora: stage 4 does not take these shapes or types"):
            torch.ops.minillm.lora(*call)
        return
    out, _ = torch.ops.minillm.lora(*call)
    theirs = ops.lora.implementations["reference"](*call[:7])
    with torch.no_grad():
        truth = ops.lora.implementations["reference"](*(t.double().cpu() for t in call[:4]), case.scale, 0.1, SEED)
    close(out, theirs, truth)


@EVERY_TYPE
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_each_stage_of_mixed_batches(stage, types):
    """Stage 4 is for bfloat16 alone."""
    case = LARGE_MIXED["decoding"]
    (y, x, a, b, numbers, scale), _ = case.tensors(*types, DEVICE)
    call = (*(t.detach() for t in (y, x, a, b)), numbers, None, scale.detach().float(), stage)
    if stage == 4 and types[1] == torch.float32:
        with pytest.raises(RuntimeError, match="lora_gather: stage 4 does not take these shapes or types"):
            torch.ops.minillm.lora_gather(*call)
        return
    out, _ = torch.ops.minillm.lora_gather(*call)
    theirs = ops.lora_gather.implementations["torch"](*call[:5], scale.detach())
    close(out, theirs, case.exact([t.detach().double().cpu() for t in (y, x, a, b, numbers, scale)]))


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_numbers_drop_out_as_on_the_processor(p, dtype):
    x, one = torch.randn(700, 64).to(dtype), torch.eye(64, dtype=dtype, device=DEVICE)
    with ops.use_backend("native"):
        dropped = ops.lora(torch.zeros(700, 64, dtype=dtype, device=DEVICE), x.to(DEVICE), one, one, 1.0, p, SEED)
    torch.testing.assert_close(dropped.cpu(), ops.dropout(x, p, SEED))
    torch.testing.assert_close(ops.dropout(x.to(DEVICE), p, SEED).cpu(), ops.dropout(x, p, SEED))


def test_the_same_bits_each_time():
    tensors, grad = LARGE["training"].tensors(torch.bfloat16, torch.bfloat16, DEVICE)
    x, _, _, a, b = tensors
    found = []
    for _ in range(3):
        with ops.use_backend("native"):
            y = ops.lora_linear(*tensors, 0.75, 0.05, SEED)
        found.append((y, *torch.autograd.grad(y, (x, a, b), grad)))
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_accepts_the_operations(dropout):
    shapes = ((6, 7), (6, 12), (3, 12), (7, 3))
    y, x, a, b = (torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes)
    seed = SEED if dropout else None
    torch.library.opcheck(torch.ops.minillm.lora.default, (y, x, a, b, 0.5, dropout, seed))
    (y, x, a, b, numbers, scale), _ = MIXED["a few positions"].tensors(torch.float32, torch.float32, DEVICE)
    for ranks in (None, torch.tensor(MIXED["a few positions"].ranks, device=DEVICE)):
        torch.library.opcheck(torch.ops.minillm.lora_gather.default, (y, x, a, b, numbers, ranks, scale))


def test_compiled_without_a_break(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the checks of shapes cannot be compiled
    made = LoRALinear(torch.nn.Linear(64, 48), 4, 6.0, dropout=0.3).to(DEVICE).train()
    x = torch.randn(300, 64, device=DEVICE)
    with ops.use_backend("native"):
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        torch.manual_seed(4)
        y = compiled(x)
        torch.manual_seed(4)
        torch.testing.assert_close(y, made(x))


def test_autocast_runs_our_kernels_in_bfloat16():
    made = LoRALinear(torch.nn.Linear(64, 48), 4, 6.0, dropout=0.3).to(DEVICE).train()
    torch.nn.init.normal_(made.lora_B)
    x = torch.randn(300, 64, device=DEVICE)
    ops.lora_linear.refused.clear()
    with torch.autocast(DEVICE, torch.bfloat16), ops.use_backend("auto"):
        torch.manual_seed(4)
        y = made(x)
    assert y.dtype == torch.bfloat16 and not ops.lora_linear.refused
    torch.manual_seed(4)
    update = made.scale * (ops.dropout(x, 0.3, ops.dropout_seed()) @ made.lora_A.mT) @ made.lora_B.mT
    torch.testing.assert_close(y.float(), made.base(x) + update, rtol=2**-6, atol=0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=128)
    made = build(ModelConfig(**sizes, init_std=0.1)).to(DEVICE).eval()
    for name, rank in (("a", 4), ("b", 7)):
        tune(made, LoraConfig(rank=rank, alpha=16.0, targets=("all-linear",)), name=name)
        for path, parameter in made.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(parameter, std=0.05)
        activate(made)  # none, so that the next stands beside it
    return made


def test_an_adapted_model_is_that_of_torch(model):
    activate(model, "b")
    tokens = torch.randint(2, 61, (3, 20), device=DEVICE)
    found = []
    for backend in ("native", "torch"):
        with ops.use_backend(backend):
            logits = model(tokens)
            trained = [p for p in model.parameters() if p.requires_grad]
            found.append((logits, *torch.autograd.grad(logits.square().mean(), trained)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_mixed_batch_is_each_row_alone(model):
    """Logits, and the tokens that generation finds."""
    tokens, names = torch.randint(2, 61, (4, 9), device=DEVICE), ["b", None, "a", "b"]
    with ops.use_backend("native"), torch.no_grad():
        with rows(model, names):
            together, written = model(tokens), generate_tokens(model, tokens, max_new_tokens=12)
        for row, name in enumerate(names):
            activate(model, name) if name else activate(model)
            torch.testing.assert_close(together[row], model(tokens[row : row + 1])[0], rtol=1e-3, atol=1e-4)
            assert torch.equal(written[row], generate_tokens(model, tokens[row : row + 1], max_new_tokens=12)[0])


def test_what_the_gpu_leaves_to_torch_is_said():
    x, a, b = (torch.randn(s, device=DEVICE) for s in ((64, 32), (4, 32), (32, 4)))
    ops.lora.refused.clear()
    with ops.use_backend("auto"):
        ops.lora(x, x, a, b, 1.0)
        assert "float32 rows without dropout on a GPU" in ops.info()["lora"]["torch"]
    with ops.use_backend("native"):
        with pytest.raises(ValueError, match="float16"):
            ops.lora(x.half(), x.half(), a.half(), b.half(), 1.0)
        with pytest.raises(ValueError, match="on different devices"):
            ops.lora(x, x, a.cpu(), b.cpu(), 1.0)
    ops.lora.refused.clear()
