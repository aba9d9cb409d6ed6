"""The same model, training and generation on a GPU as on the CPU. Skipped where there is no GPU."""

import pytest
import torch

from minillm.data import PackedLoader, write_tokens
from minillm.data.documents import Document
from minillm.generation import generate_tokens, static_cache
from minillm.models import ModelConfig, build
from minillm.ops import linear_cross_entropy, use_backend
from minillm.peft import LoraConfig, activate, merge, tune
from minillm.tokenizers import ByteTokenizer
from minillm.training import TrainConfig, Trainer, causal_lm_loss

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = dict(vocab_size=259, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=128, init_std=0.1)


@pytest.fixture
def model():
    return build(ModelConfig(**SIZES)).eval()


@pytest.fixture
def loader(tmp_path):
    documents = [Document(str(i), f"line {i} of a text to learn by heart. " * 9) for i in range(20)]
    return PackedLoader(write_tokens(documents, ByteTokenizer(), tmp_path / "tokens"), batch_size=4, length=32)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_logits_and_gradients_equal_the_cpus(model, backend):
    """float64, so that only the order of the sums differs."""
    tokens = torch.randint(0, 259, (3, 17))
    mask = torch.arange(17) >= torch.tensor([0, 5, 16])[:, None]
    found = {}
    for device in ("cpu", DEVICE):
        twin = build(model.config).double().to(device)
        twin.load_state_dict(model.double().state_dict())
        with use_backend(backend):
            logits = twin(tokens.to(device), mask=mask.to(device))
        (logits[mask.to(device)].square().sum()).backward()
        found[device] = [logits[mask.to(device)].cpu(), *(p.grad.cpu() for p in twin.parameters())]
    for here, there in zip(found["cpu"], found[DEVICE], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9 * here.abs().max().item())


def test_the_heads_loss_equals_the_definition():
    hidden = torch.randn(70, 32, device=DEVICE, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(90, 32, device=DEVICE, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 90, (70,), device=DEVICE)
    targets[::7] = -100
    loss = linear_cross_entropy(hidden, weight, targets, chunk=16)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("static", [False, True])
def test_greedy_tokens_equal_the_cpus(model, static):
    model = model.double()
    tokens = torch.randint(0, 259, (2, 9))
    mask = torch.arange(9) >= torch.tensor([0, 4])[:, None]
    expected = generate_tokens(model, tokens, max_new_tokens=12, mask=mask)
    model.to(DEVICE)
    cache = static_cache(model, 2, 32) if static else None
    found = generate_tokens(model, tokens.to(DEVICE), max_new_tokens=12, mask=mask.to(DEVICE), cache=cache)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_lowers_the_loss_and_resumes(model, loader, tmp_path, precision, method):
    if method == "lora":
        tune(model, LoraConfig(rank=4, alpha=16.0, targets=("all-linear",)))
    config = TrainConfig(steps=30, lr=1e-2, device=DEVICE, precision=precision, save_every=0)
    batch = {name: tensor.to(DEVICE) for name, tensor in next(loader).items()}
    model.to(DEVICE)
    before = causal_lm_loss(model, batch).value.item()
    Trainer(model, causal_lm_loss, loader, config, tmp_path / "run").fit()
    assert causal_lm_loss(model, batch).value.item() < before - 0.5
    assert Trainer(model, causal_lm_loss, loader, config, tmp_path / "run").resume() == 30


def test_merging_on_the_device(model):
    model.double().to(DEVICE)
    tune(model, LoraConfig(rank=4, alpha=16.0, targets=("all-linear",)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    tokens = torch.randint(0, 259, (2, 9), device=DEVICE)
    unmerged = model(tokens)
    merge(model)
    torch.testing.assert_close(model(tokens), unmerged)


def test_an_inactive_adapter_follows_the_model(model):
    for name in "ab":
        tune(model, LoraConfig(rank=4, targets=("q_proj",), trainable=("norm",)), name=name)
        activate(model)
    model.to(DEVICE)
    activate(model, "a")
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
    model(torch.zeros(1, 3, dtype=torch.long, device=DEVICE))
