"""The keys of `minillm tune`: a section for each method, of which only the chosen one counts."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from minillm.config import seed_flaw
from minillm.peft import METHODS, Method
from minillm.peft.names import DEFAULT
from minillm.peft.tune import bad_name
from minillm.recipes.common import DataConfig
from minillm.recipes.prune import PruneConfig
from minillm.training import TrainConfig


@dataclass(frozen=True)
class TuneDataConfig(DataConfig):
    """As for pretraining, with fewer rows in a batch."""

    batch_size: int = 8


@dataclass(frozen=True)
class _TuneConfig:
    """All of TuneConfig but the methods' sections."""

    base: str = ""  # a run or a model folder; an adapter is merged first, in run/base, or stays on it, in run/under
    method: Literal[tuple(METHODS)] = "lora"  # minillm methods says what they are
    run: str = ""  # the folder to write; when empty, runs/tune-<date>-<time>
    adapters: tuple[tuple[str, str], ...] = ()  # what method=fusion fuses, tuned bottlenecks: a:runs/one,b:runs/two
    seed: int = 0  # of the adapter's initial weights
    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200, weight_decay=0.0, eval_every=50))

    def __post_init__(self):
        wrong = seed_flaw(self.seed)
        for name in SECTIONS:
            section = getattr(self, name)
            if name != self.method and section != type(section)():
                wrong.append(f"method={self.method} uses no key of {name}: leave {name}.* out, or choose method={name}")
        wrong += self._wrong_adapters()
        if wrong:
            raise ValueError("\n".join(wrong))

    def _wrong_adapters(self) -> list[str]:
        """What is wrong with `adapters` by itself; their folders are read later."""
        names = [name for name, _ in self.adapters]
        if self.method != "fusion":
            return [f"adapters: method={self.method} fuses none: leave it out, or choose method=fusion"] * bool(names)
        if len(names) < 2:
            return ["adapters: which? Name at least two tuned bottlenecks, such as adapters=a:runs/one,b:runs/two"]
        wrong = [f"adapters: {flaw}" for name in names if (flaw := bad_name(name))]
        wrong += [f"adapters: {name!r} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        if DEFAULT in names:
            wrong.append(f"adapters: {DEFAULT!r} will be the fusion itself: choose another name")
        if self.fusion.adapters not in (type(self.fusion)().adapters, tuple(names)):
            wrong.append("fusion.adapters: leave it out, adapters=... names them")
        return wrong

    @property
    def chosen(self) -> Method:
        """The config of the chosen method; for pruned_bitfit that of all biases it chooses among."""
        if self.method == "fusion":
            return dataclasses.replace(self.fusion, adapters=tuple(name for name, _ in self.adapters))
        if self.method == "pruned_bitfit":
            return self.pruned_bitfit.unpruned
        return getattr(self, self.method) if self.method in SECTIONS else METHODS[self.method]()


# Which entries pruned BitFit trains is nothing to type: the section says how the run finds them.
SECTIONS = {name: method for name, method in METHODS.items() if dataclasses.fields(method)}
SECTIONS |= {"pruned_bitfit": PruneConfig}
TuneConfig = dataclasses.make_dataclass(
    "TuneConfig",
    [(name, method, field(default_factory=method)) for name, method in SECTIONS.items()],
    bases=(_TuneConfig,),
    frozen=True,
    namespace={
        "__module__": __name__,
        "__doc__": """`minillm tune`. The tokenizer is always the base's. Only the section of the chosen method counts.

    Full tuning usually wants a learning rate a few times smaller than LoRA, prompts and biases one much larger.
    """,
    },
)
