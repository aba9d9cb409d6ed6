"""Every method by name. A new method is a file of its own, and a line here."""

import importlib
from collections.abc import Iterator, Mapping

from minillm.config import nearest
from minillm.peft.method import Method


class Methods(Mapping[str, type[Method]]):
    """Every method by name; its file is imported when it is asked for."""

    def __init__(self, places: Mapping[str, str]):
        self._places = places

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._places:
            raise KeyError(f"there is no method {name!r}; did you mean {nearest(str(name), self._places)}?")
        module, cls = self._places[name].split(".")
        return getattr(importlib.import_module(f"minillm.peft.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


METHODS = Methods(
    {
        "lora": "lora.LoraConfig",
        "qlora": "qlora.QLoraConfig",
        "qalora": "qalora.QaLoraConfig",
        "ia3": "ia3.Ia3Config",
        "bitfit": "bitfit.BitFitConfig",
        "pruned_bitfit": "sparse_bias.PrunedBitFitConfig",
        "bottleneck": "bottleneck_config.BottleneckConfig",
        "fusion": "fusion.FusionConfig",
        "prompt": "prompt.PromptConfig",
        "ptuning": "ptuning.PTuningConfig",
        "prefix": "prefix.PrefixConfig",
        "increlora": "increlora.IncreLoraConfig",
        "mola": "mola.MolaConfig",
        "full": "in_place.FullConfig",
        "partial": "in_place.PartialConfig",
    }
)
