"""Numbers of their own for some targets: which key counts, and that peft means the same by ours and we by theirs."""

import copy

import peft
import pytest
import torch

from minillm.peft import LoraConfig, load_adapter, save_adapter, tune
from minillm.peft.patterns import ambiguous, from_peft, value_of

NAMES = [f"layers.{i}.attn.{leaf}" for i in range(2) for leaf in ("q", "k")]


@pytest.mark.parametrize(
    "pairs, found",
    [
        ((), [1, 1, 1, 1]),
        ((("q", 2),), [2, 1, 2, 1]),
        ((("q", 2), ("layers.0.attn.q", 3)), [3, 1, 2, 1]),
        ((("attn.q", 2), ("layers.1.attn.k", 3)), [2, 1, 2, 3]),
        ((("ttn.q", 2),), [1, 1, 1, 1]),
    ],
)
def test_a_key_is_the_end_of_a_path_and_a_whole_path_goes_first(pairs, found):
    for order in (pairs, pairs[::-1]):
        assert [value_of(order, name, 1) for name in NAMES] == found
        assert not any(ambiguous(order, name) for name in NAMES)


def test_two_ends_that_differ_are_ambiguous():
    pairs = (("q", 2), ("attn.q", 3), ("k", 4), ("attn.k", 4))
    assert ambiguous(pairs, NAMES[0]) == "'q': 2 and 'attn.q': 3 both mean it; leave one out"
    assert ambiguous(pairs, NAMES[1]) is None  # both say 4


def test_of_peft_s_keys_the_first_counts():
    """As in peft's get_pattern_key."""
    for pattern in ({"q": 2, "attn.q": 3}, {"attn.q": 3, "q": 2}, {"q": 2, "layers.0.attn.q": 5}):
        ours = tuple(from_peft(pattern, NAMES, ["q", "k"]).items())
        for name in NAMES:
            key = peft.utils.other.get_pattern_key(pattern, name)
            assert value_of(ours, name, 1) == pattern.get(key, 1) and ambiguous(ours, name) is None
    assert from_peft({"q": 2, "k": 3}, NAMES, ["q", "k"]) == {"q": 2, "k": 3}
    assert from_peft(None, NAMES, ["q"]) == {}


def test_peft_reads_whole_paths_and_ends_in_one_pattern(llama, tokens, perturb, tmp_path):
    """Written as given, peft would take the first key, q_proj, for layer 1 too, and miss a rank of 4."""
    fresh = copy.deepcopy(llama)
    layer = "model.layers.1.self_attn.q_proj"
    config = LoraConfig(rank=2, rank_pattern={"q_proj": 3, layer: 4}, alpha_pattern={"q_proj": 5.0, layer: 7.0})
    tune(llama, config)
    save_adapter(perturb(llama), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(tokens).logits, llama(tokens).logits, rtol=1e-5, atol=1e-5)


def test_what_peft_allows_is_read_as_peft_reads_it(llama, tokens, perturb, tmp_path):
    """Targets that match twice, and keys of which the first counts (in the file they are in alphabetical order)."""
    fresh = copy.deepcopy(llama)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "self_attn.q_proj", "v_proj"],
        rank_pattern={"q_proj": 3, "self_attn.q_proj": 4},
        alpha_pattern={"q_proj": 5, "self_attn.q_proj": 7},
    )
    theirs = peft.get_peft_model(llama, config).eval()
    perturb(theirs).save_pretrained(tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert fresh.model.layers[0].self_attn.q_proj.rank == 3
    torch.testing.assert_close(fresh(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_peft_s_ia3_with_targets_that_match_twice(llama, tokens, perturb, tmp_path):
    fresh = copy.deepcopy(llama)
    targets = ["k_proj", "self_attn.k_proj", "mlp.down_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    theirs = peft.get_peft_model(llama, config).eval()
    perturb(theirs).save_pretrained(tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
