"""The rows of the scoreboard, as data: what trains, and the learning rates it may try.

A row of your own, in any Python file that then calls `compare`:

    register_row(Row("lora-1", "LoRA, rank 1", "low rank", LoraConfig(rank=1), rates=(3e-3, 1e-2, 1e-3)))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from minillm.config import nearest
from minillm.peft import (
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    Ia3Config,
    IncreLoraConfig,
    LoraConfig,
    Method,
    MolaConfig,
    PartialConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    QaLoraConfig,
    QLoraConfig,
)

RATES = 3  # that every row has to choose from
FAMILIES = ("in place", "adapters", "low rank", "prompts")


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    method: its config, or what makes it of (the model, the number of steps).
    rates: learning rates, the likeliest first. Every row has as many, and a study with a smaller budget tries the
        first ones: the budget is the same for all, the rates are each method's own.
    """

    name: str
    title: str
    family: str  # which rows share a panel of the learning curves
    method: Method | Callable[[nn.Module, int], Method]
    rates: tuple[float, ...]

    def __post_init__(self):
        wrong = []
        if not self.name or set(self.name) & set("/\\. ,="):
            wrong.append(f"name {self.name!r}: letters, digits, - and _; it names a folder")
        if len(set(self.rates)) != RATES or not all(0 < rate < math.inf for rate in self.rates):
            wrong.append(f"rates {self.rates}: {RATES} different numbers above 0, as many as every row has to try")
        if wrong:
            raise ValueError("this row cannot be compared: " + "; ".join(wrong))

    def config(self, model: nn.Module, steps: int) -> Method:
        """The method's config for this model and so many steps."""
        return self.method if isinstance(self.method, Method) else self.method(model, steps)


def growing(model: nn.Module, steps: int) -> IncreLoraConfig:
    """IncreLoRA whose ranks have grown after about two thirds of the steps, in at most ten rounds."""
    rounds = max(2, min(10, steps // 4))  # a layer gets one rank in each
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())  # at least as many as there are targets
    sizes = {"rank": 2, "target_rank": 4, "max_rank": 8, "targets": EVERY}
    winners = math.ceil((sizes["target_rank"] - sizes["rank"]) * layers / rounds)
    return IncreLoraConfig(**sizes, warmup=steps // 10, interval=max(1, steps // (2 * rounds)), winners=winners)


EVERY = ("all-linear",)
LOW, MIDDLE, HIGH, HIGHER = (1e-3, 3e-4, 3e-3), (3e-3, 1e-3, 1e-2), (1e-2, 3e-3, 3e-2), (3e-2, 1e-2, 1e-1)
_TABLE = (
    Row("head", "frozen + head", "in place", PartialConfig(untie=True), HIGH),
    Row("full", "full fine-tuning", "in place", FullConfig(), LOW),
    Row("last-2", "last 2 layers", "in place", PartialConfig(modules=(), last=2), LOW),
    Row("bitfit", "BitFit, all biases", "in place", BitFitConfig(), HIGH),
    Row("bitfit-half", "BitFit, queries and MLP", "in place", BitFitConfig(biases="half"), HIGH),
    Row("houlsby", "adapters (Houlsby)", "adapters", BottleneckConfig(kind="houlsby"), MIDDLE),
    Row("pfeiffer", "adapters (Pfeiffer)", "adapters", BottleneckConfig(kind="pfeiffer"), MIDDLE),
    Row("ia3", "(IA)3", "adapters", Ia3Config(), HIGHER),
    Row("lora", "LoRA", "low rank", LoraConfig(targets=EVERY), MIDDLE),
    Row("rslora", "rsLoRA", "low rank", LoraConfig(targets=EVERY, rslora=True), MIDDLE),
    Row("increlora", "IncreLoRA", "low rank", growing, MIDDLE),
    Row("mola", "MoLA", "low rank", MolaConfig(rank=4), MIDDLE),
    Row("qlora", "QLoRA", "low rank", QLoraConfig(), MIDDLE),
    Row("qalora", "QA-LoRA", "low rank", QaLoraConfig(group=16), MIDDLE),
    Row("prompt", "prompt tuning", "prompts", PromptConfig(length=10), HIGHER),
    Row("ptuning", "P-tuning", "prompts", PTuningConfig(length=10, encoder="mlp"), MIDDLE),
    Row("prefix", "prefix tuning", "prompts", PrefixConfig(length=10), HIGH),
)
ROWS: dict[str, Row] = {row.name: row for row in _TABLE}


def register_row(row: Row) -> Row:
    """Add a row to the scoreboard; `methods=all` has it from now on. ValueError if its name is taken."""
    if ROWS.get(row.name, row) != row:
        raise ValueError(f"there is a row {row.name!r} already: {ROWS[row.name].title}; choose another name")
    ROWS[row.name] = row
    return row


def choose_rows(names: Sequence[str]) -> list[Row]:
    """The rows of these names in the table's order; "all" is every one. ValueError naming the nearest for others."""
    if unknown := [name for name in names if name not in ROWS and name != "all"]:
        lines = [f"there is no {name!r}; did you mean {nearest(name, ['all', *ROWS])}?" for name in unknown]
        raise ValueError("methods: " + "\n  ".join(lines))
    if not names:
        raise ValueError(f"methods: which? methods=all, or some of {','.join(ROWS)}")
    return [row for name, row in ROWS.items() if name in names or "all" in names]
