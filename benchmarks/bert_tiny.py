"""One training step of BERT-tiny on labelled texts by LoRA, BitFit, prefix and prompt tuning, against peft.

    python benchmarks/run.py bert_tiny

The peer is transformers' BertForSequenceClassification with the same weights, tuned by peft; BitFit, which peft has
not, is the same model with its biases and classifier left to train. Losses agree before the clock starts, except for
prompt tuning: there peft reads the class from a virtual token and we from [CLS] (see tests/peft/test_prompt_peft.py).

Both sides run torch's sdpa attention, the same fused AdamW, and no dropout. What they share, matrix products, attention
and GELU, is six sevenths of a step, so most of the margin is work left out: the class is read from [CLS] alone, and our
last block computes keys and values of all tokens but the rest for that one only. Of two blocks this is two fifths of
the step; a deep encoder saves that much of its last block and no more.
"""

import tempfile
from collections.abc import Callable

import torch
from common import Goal, compare
from torch import Tensor, nn

import minillm
from minillm.peft import METHODS, tune
from minillm.training import TrainConfig, classification_loss, make_optimizer

BATCH, LENGTH, LABELS, VIRTUAL = 16, 128, 2, 20
SETTINGS = {
    "lora": {"rank": 8, "alpha": 16.0, "targets": ("q_proj", "v_proj")},
    "bitfit": {},
    "prefix": {"length": VIRTUAL},
    "prompt": {"length": VIRTUAL},
}
HEAD = ("pooler.dense", "classifier")  # the peer trains these two as well
BLOCKS = {"BERT-tiny": 2, "BERT-tiny with 12 blocks": 12}
GOALS = [
    Goal(
        f"{model}, {name} step, time / {'transformers' if name == 'bitfit' else 'peft'}",
        (model, name, "time_ratio"),
        0.90,
        note="most of the margin is the last block's, and the rest is the same products and attention on both sides",
    )
    for model in BLOCKS
    for name in SETTINGS
]


def peer_base(blocks: int) -> nn.Module:
    """google/bert_uncased_L-2_H-128_A-2's sizes, or with more blocks; random weights, no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": 512}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **dropouts, num_labels=LABELS))


def theirs(name: str, blocks: int) -> nn.Module:
    import peft

    model = peer_base(blocks)
    if name == "bitfit":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(
                parameter_name.endswith("bias") or any(f"{head}." in parameter_name for head in HEAD)
            )
        return model
    common = {"task_type": "SEQ_CLS", "modules_to_save": list(HEAD)}
    config = {
        "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], **common),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, **common),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **common),
    }[name]()
    return peft.get_peft_model(model, config)


def ours(name: str, blocks: int) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        peer_base(blocks).save_pretrained(folder)
        model = minillm.load(folder)
    tune(model, METHODS[name](**SETTINGS[name], trainable=HEAD))
    return model


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1000, 30000, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
    return {"tokens": tokens, "mask": torch.arange(LENGTH) < lengths, "labels": torch.arange(BATCH) % LABELS}


def our_loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return classification_loss(model, data).value


def their_loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return model(input_ids=data["tokens"], attention_mask=data["mask"].long(), labels=data["labels"]).loss


def training_step(model: nn.Module, loss_of: Callable[[nn.Module, dict], Tensor]) -> Callable[[], None]:
    data, optimizer = batch(), make_optimizer(model.train(), TrainConfig(lr=1e-4))

    def step() -> None:
        loss_of(model, data).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def assert_same(mine: nn.Module, peer: nn.Module, name: str) -> None:
    """As many values train, and where both compute the same the losses agree to 1e-5."""
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (mine, peer)]
    assert counts[0] == counts[1], f"{name}: {counts[0]} values train here, {counts[1]} there"
    if name in ("lora", "bitfit"):  # prefixes and prompts start at random
        torch.testing.assert_close(our_loss(mine, batch()), their_loss(peer, batch()), rtol=1e-5, atol=0)


def measure(repeats: int = 15) -> dict:
    result: dict[str, dict] = {model: {} for model in BLOCKS}
    for model, blocks in BLOCKS.items():
        for name in SETTINGS:
            mine, peer = ours(name, blocks), theirs(name, blocks)
            assert_same(mine, peer, name)
            sides = {"minillm": training_step(mine, our_loss), "peer": training_step(peer, their_loss)}
            result[model][name] = compare(sides, "minillm", "peer", repeats=repeats)
    return result
