"""An encoder that is asked for one state of each row: the same state, and a last block that computes no other."""

import pytest
import torch
from torch.nn.functional import pad

from minillm.models import HeadConfig, ModelConfig, attention_maps, build, build_with_head
from minillm.peft import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig, tune

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "max_positions": 24,
    "positions": "learned",
}
AT = torch.tensor([0, 3, 5])
MASKS = {
    "none": None,
    "right": torch.arange(6) < torch.tensor([[6], [4], [6]]),
    "left": pad(torch.ones(3, 4, dtype=torch.bool), (2, 0)),
    "queries": torch.ones(3, 6, 6, dtype=torch.bool).tril(1),
}


def encoder(**options):
    torch.manual_seed(0)
    return build(ModelConfig(kind="encoder", **(SIZES | options))).double()


@pytest.mark.parametrize("positions", ["learned", "relative", "rope", "sinusoidal"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_state_is_that_of_all(positions, norm_first, mask, checkpointing):
    """The states and the gradients of all parameters, with whatever tells one query from another."""
    tokens, grads = torch.randint(40, (3, 6)), []
    for at in (None, AT):
        model = encoder(positions=positions, norm_first=norm_first)
        model.gradient_checkpointing = checkpointing
        states = model.hidden(tokens, mask=MASKS[mask], at=at)
        read = states[torch.arange(3), AT] if at is None else states[:, 0]
        (read * torch.arange(16)).sin().sum().backward()
        grads.append([read.detach(), *(p.grad for p in model.parameters())])
        assert states.shape == (3, 6 if at is None else 1, 16)
    for whole, narrow in zip(*grads, strict=True):
        torch.testing.assert_close(narrow, torch.zeros_like(narrow) if whole is None else whole)


METHODS = [LoraConfig(), PrefixConfig(length=3), PromptConfig(length=3), BottleneckConfig()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("task", ["classification", "embedding", "choice"])
@pytest.mark.parametrize("mask", ["none", "right", "left"])
def test_heads_ask_for_it_through_adapters_too(method, task, mask):
    torch.manual_seed(0)
    model = build_with_head(ModelConfig(kind="encoder", **SIZES), HeadConfig(task=task, num_labels=3)).double()
    tune(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    tokens, mask, seen = torch.randint(40, (3, 6)), MASKS[mask], []
    model.body.layers[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    choice = (lambda x: x if x is None else x[None]) if task == "choice" else lambda x: x
    answer = model(choice(tokens), mask=choice(mask))
    assert seen == [(3, 1, 16)]
    expected = model.pooler(model.body.hidden(tokens, mask=mask), mask)
    if task != "embedding":
        expected = model.classifier(expected)
    torch.testing.assert_close(answer.reshape(expected.shape), expected)


@pytest.mark.parametrize("task", ["classification", "choice"])
def test_attention_maps_still_show_every_query(task):
    model, tokens = (
        build_with_head(ModelConfig(kind="encoder", **SIZES), HeadConfig(task=task)),
        torch.randint(40, (3, 6)),
    )
    maps = attention_maps(model, tokens[None] if task == "choice" else tokens, mask=None)
    assert [weights.shape for weights in maps] == [(3, 2, 6, 6)] * 2
