"""Names of modules, fused matrices and peft's rules, each against what it stands for."""

import itertools

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from minillm.finetune.hub_fusing import LoRA, cut, fuse, fuse_factors
from minillm.finetune.hub_rules import by_pattern, say_pattern, say_targets, targeted
from minillm.models.families.load import load_hf
from minillm.models.families.module_names import HubModule, hub_names, split

QKV = HubModule(("attn.c_attn",), 0, 6, ("q", "k", "v"), (6, 2, 4), True, 0)
PATHS = [
    *("model.norm", "model.layers.1.attn_norm", "score", "pre_score", "a.score", "model.layers.11.mlp.up"),
    *(f"model.layers.{i}.{m}_proj" for i in (0, 1, 10) for m in "qv"),
]


@pytest.mark.parametrize(
    "name", ["gpt2", "phi3", "bert-masked-lm", "roberta-classifier", "distilbert", "t5", "mbart-body"]
)
def test_every_module_is_where_the_table_says(name, theirs):
    model, folder = theirs(name)
    ours = load_hf(folder)
    names, state = hub_names(ours), model.state_dict()
    for module, place in names.modules.items():
        for path in place.paths:
            weight = state[f"{path}.weight"]
            rows = (weight.t() if place.transposed else weight)[place.skipped_rows :][place.start : place.stop]
            assert torch.equal(rows, ours.get_submodule(module).weight)
            assert names.at(path).paths == place.paths
    parameters = dict(ours.named_parameters())
    for key, entry in names.state.items():
        assert all(torch.equal(part, parameters[part_of]) for part_of, part in split(entry, state[key]).items())
    assert {p for entry in names.entries for p in entry.parameters} == set(parameters)


def loras(ranks, scales):
    return {
        part: LoRA(torch.randn(rank, 5).double(), torch.randn(size, rank).double(), scale)
        for part, size, rank, scale in zip(QKV.parts, QKV.sizes, ranks, scales, strict=True)
        if rank
    }


def update(lora):
    return lora.scale * lora.B @ lora.A


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3), (2, 0, 2), (0, 0, 1)])
@pytest.mark.parametrize("scales", [(3.0, 3.0, 3.0), (3.0, 0.7, 1.1)])
def test_the_fused_update_is_the_parts_one_below_the_other(ranks, scales):
    parts = loras(ranks, scales)
    fused = fuse(QKV, parts)
    assert len(fused.A) == sum(ranks)
    wanted = [
        update(parts[p]) if p in parts else torch.zeros(size, 5) for p, size in zip("qkv", QKV.sizes, strict=True)
    ]
    torch.testing.assert_close(update(fused), torch.cat([w.double() for w in wanted]))
    back = cut(QKV, fused, {part: (len(lora.A), lora.scale) for part, lora in parts.items()})
    assert back.keys() == parts.keys()
    for part, lora in parts.items():
        assert torch.equal(back[part].A, lora.A) and back[part].scale == lora.scale
        torch.testing.assert_close(back[part].B, lora.B)


def test_a_shared_a_keeps_the_rank():
    one = LoRA(torch.randn(3, 5), torch.randn(12, 3), 2.0)
    parts = cut(QKV, one, {part: (3, 2.0) for part in QKV.parts})
    assert all(torch.equal(part.A, one.A) for part in parts.values())
    again = fuse(QKV, parts)
    assert torch.equal(again.A, one.A) and torch.equal(again.B, one.B) and again.scale == one.scale
    parts["v"] = parts["v"]._replace(A=parts["v"].A + 1)
    assert len(fuse(QKV, parts).A) == 9


def test_factors_of_a_part_that_has_none_are_ones():
    fused = fuse_factors(QKV, {"v": torch.full((4, 1), 2.0)})
    assert fused.flatten().tolist() == [1.0] * 8 + [2.0] * 4


@pytest.mark.parametrize(
    "targets", [["score"], ["q_proj", "norm"], r".*\.1\..*", ["layers.1.q_proj"], "score|model.norm"]
)
@pytest.mark.parametrize("more", [{}, {"layers_to_transform": [1]}, {"exclude_modules": ["1.q_proj"]}])
def test_targets_mean_what_they_mean_to_peft(targets, more):
    if isinstance(targets, str) and "layers_to_transform" in more:
        more = {"exclude_modules": r".*q_proj"}  # to a regular expression peft accepts no layers
    fields = {"target_modules": targets, **more}
    config = peft.LoraConfig(**fields)
    assert targeted(fields, PATHS) == [path for path in PATHS if check_target_module_exists(config, path)]


def test_targets_that_are_said_mean_these_and_no_others():
    for wanted in itertools.combinations(PATHS, 2):
        config = peft.LoraConfig(target_modules=say_targets(wanted, PATHS))
        assert {path for path in PATHS if check_target_module_exists(config, path)} == set(wanted)
    assert say_targets(["score"], PATHS) == "score"  # a list would mean a.score too


def test_patterns_mean_what_they_mean_to_peft():
    for pattern in ({"score": 3}, {"q_proj": 1, r".*\.1\.v_proj": 2}, {"layers.1.q_proj": 7}, {"nothing": 5}):
        for path in PATHS:
            assert by_pattern(pattern, path, 9) == pattern.get(get_pattern_key(pattern.keys(), path), 9)
    values = dict.fromkeys(PATHS, 4) | {"score": 3, "model.layers.1.q_proj": 2}
    usual, pattern = say_pattern(values, 4)
    assert usual == 4 and {path: by_pattern(pattern, path, usual) for path in PATHS} == values
