import warnings

import pytest
import torch
from torch import nn

from minillm.models import ModelConfig, build
from minillm.training import TrainConfig, make_optimizer


def names_by_decay(model: nn.Module) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_decay_falls_on_matrices_only(toy):
    assert names_by_decay(toy()) == {
        0.3: {"up_proj.weight", "lm_head.weight"},
        0.0: {"embed_tokens.weight", "up_proj.bias", "norm.weight", "norm.bias", "lm_head.bias"},
    }


def test_a_tied_head_is_an_embedding(tiny_decoder):
    decayed = names_by_decay(tiny_decoder)[0.3]
    assert tiny_decoder.lm_head.weight is tiny_decoder.embed_tokens.weight
    assert {name.rpartition("layers.")[2][2:] for name in decayed} == {
        f"{part}.weight"
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }


@pytest.mark.parametrize("positions, table", [("learned", "embed_positions"), ("relative", "relative_positions")])
def test_tables_of_positions_are_not_decayed(positions, table):
    names = names_by_decay(
        build(ModelConfig(vocab_size=11, hidden_size=8, num_heads=2, num_layers=1, positions=positions))
    )
    assert f"{table}.weight" in names[0.0] and not any(table in name for name in names[0.3])


def test_is_adamw_as_torch_writes_it_out():
    """Two steps of the fused optimizer against torch's unfused, single-tensor code, with the same two groups."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3, dtype=torch.float64), nn.Linear(5, 3, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    config = TrainConfig(lr=0.02, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-5)
    plain = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-5, "foreach": False, "fused": False}
    optimizers = [
        make_optimizer(ours, config),
        torch.optim.AdamW([theirs.weight], weight_decay=0.3, **plain),
        torch.optim.AdamW([theirs.bias], weight_decay=0.0, **plain),
    ]
    for _ in range(2):
        x = torch.randn(4, 5, dtype=torch.float64)
        for layer in (ours, theirs):
            layer.zero_grad()
            layer(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=0)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train: no parameter of the model requires a gradient; unfreeze"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_spoken_of(dtype):
    """Adam's first step is lr = 1e-3 for every value; near 1 the next number of bfloat16 is 2^-7 away."""
    model = nn.Linear(3, 2).to(dtype)
    with pytest.warns(UserWarning, match=r"^8 of the values to be trained are in half precision.*dtype=torch\.float32"):
        make_optimizer(model, TrainConfig())
    model.bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="^6 of the values"):
        make_optimizer(model, TrainConfig())


def test_a_frozen_base_in_half_precision_is_nothing_to_speak_of():
    model = nn.Sequential(nn.Linear(3, 2).bfloat16().requires_grad_(False), nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_optimizer(model, TrainConfig())
