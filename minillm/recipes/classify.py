"""`minillm classify`: the class of a text, by a model that was tuned with data.label."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minillm.data import example_batches, text_examples
from minillm.peft.doors import positions_taken
from minillm.recipes.common import format_table
from minillm.recipes.locate import load
from minillm.training.distributed import pick_device


@dataclass(frozen=True)
class ClassifyConfig:
    """`minillm classify`: where to compute."""

    base: str = ""  # of an adapter whose base was moved
    device: Literal["auto", "cpu", "cuda"] = "auto"


@torch.no_grad()
def classify(folder: str | Path, text: str, config: ClassifyConfig) -> str:
    """A table of the classes and their probabilities, the likeliest first."""
    device = pick_device(config.device)
    model, tokenizer, _, labels = load(folder, base=config.base, device=device, writes=False)
    if not labels:
        raise ValueError(
            f"{folder} names no classes: it was not tuned with data.label; minillm generate continues texts"
        )
    room = model.config.max_positions - positions_taken(model.body)
    examples = text_examples(tokenizer, [text], [0], max_length=room)
    (batch,) = example_batches(examples, 1, tokenizer.pad_id or 0)
    inputs = {name: batch[name].to(device) for name in ("mask", "token_types") if name in batch}
    probabilities = model(batch["tokens"].to(device), **inputs)[0].softmax(-1).tolist()
    rows = sorted(zip(labels, probabilities, strict=True), key=lambda row: -row[1])
    return format_table(("class", "probability"), rows)
