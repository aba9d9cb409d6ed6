"""What it takes to read and write the checkpoints of a model family: tables, not code.

A `Family` says which choices of `ModelConfig` all its members share, how the fields of the Hub's config.json map to
the others, and what each module is called there. `*` stands for the number of a layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minillm.models.config import ModelConfig
from minillm.models.heads import HeadConfig

REQUIRED = object()  # a field of config.json without which no model can be built
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LM, BODY = "lm", "body"  # what an architecture ends in if not in a head of `models/heads`: an LM head, or nothing


@dataclass(frozen=True)
class Architecture:
    """A class of transformers: the family's body under `prefix`, and a head.

    `modules` maps our head's modules or parameters to theirs. `head` is the HeadConfig of the task, None for `LM` and
    `BODY`. `unused` are keys that such files hold although the class does not read them, e.g. another head's.
    `zeros` are buffers that belong to the file and must be zero: they would change the computation otherwise.
    `untied` are keys that repeat another one's values in files with tied embeddings; in files without, it is they that
    transformers reads, and the other one stays unused beside them.
    """

    name: str
    task: str
    prefix: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    head: HeadConfig | None = None
    unused: tuple[str, ...] = ()  # regular expressions over whole keys
    zeros: Mapping[str, Callable[[ModelConfig], tuple[int, ...]]] = field(default_factory=dict)  # buffers: their shapes
    untied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One model family of the Hub.

    Where transformers has a dropout that ours has not (inside T5's and BART's MLP, before some heads), it is left out:
    that changes training, not what a model computes.

    `fixed`: fields of ModelConfig with the value that all members have. `fields`: ours -> (theirs, the value that
    transformers takes if theirs is absent). `demanded`: fields of theirs with the values we can follow; any other
    value would change the computation. `read` and `write` translate what a table cannot: they take all of one side's
    fields and return some of the other's.
    `modules`: our body's modules -> theirs, several of ours where theirs is one fused matrix, cut along its outputs.
    `transposed`: their modules whose weights are stored (in, out). `skipped_rows`: their embedding tables whose first
    rows no position uses. `ignored`: regular expressions over whole keys that hold no weights: buffers that follow from
    the config. `repeats`: keys that may repeat another one's values.
    """

    name: str
    model_types: tuple[str, ...]
    fixed: Mapping[str, Any]
    fields: Mapping[str, tuple[str, Any]]
    modules: Mapping[str | tuple[str, ...], str]
    architectures: tuple[Architecture, ...]
    demanded: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda theirs: {}
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    transposed: tuple[str, ...] = ()
    skipped_rows: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    repeats: Mapping[str, str] = field(default_factory=dict)
    token_ids: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(TOKEN_IDS))  # unless known
    applies: Callable[[dict[str, Any]], bool] = lambda theirs: True  # where one model_type stands for two families

    def architecture(self, task: str) -> Architecture:
        """The first architecture of that task; ValueError with the tasks there are.

        On the Hub several labels and numbers are classification with another `problem_type`.
        """
        task = "classification" if task in ("multi_label", "regression") else task
        for architecture in self.architectures:
            if architecture.task == task:
                return architecture
        tasks = dict.fromkeys(a.task for a in self.architectures)
        raise ValueError(f"{self.name} has no head for task {task!r} on the Hub: it has {', '.join(tasks)}")


ACTIVATION_NAMES = {  # theirs -> ours; the first of several is the one we write
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "silu": "silu",
    "swish": "silu",
}
