"""A task as a base learns it: what every kind of task has in common."""

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.data import ExampleLoader
from minillm.data.examples import collate
from minillm.data.tasks import Record, Task
from minillm.models import HeadConfig
from minillm.peft import Method
from minillm.recipes.compare.config import CompareConfig
from minillm.recipes.head import beside_head, describe_head, put_new_head, reading
from minillm.recipes.locate import Loaded
from minillm.training import Loss
from minillm.training.losses.base import model_inputs

Batch = Mapping[str, Tensor]
EVALUATED = 64  # texts at once: more than in training, since nothing is kept for a backward pass


class Problem(ABC):
    """A task, a base, and what stands between them; the same for every method.

    A split is read when it is first asked for, and training asks for train and valid only.
    """

    loss_fn: Callable[[nn.Module, Batch], Loss]

    def __init__(self, base: Loaded, task: Task, config: CompareConfig):
        self.base, self.task, self.settings = base, task, config
        self.tokenizer, self.kind = base.tokenizer, base.model.config.kind
        self.pad_id = base.tokenizer.pad_id or 0  # a masked position may hold any id
        self._examples: dict[str, list[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For another process: with the examples to train on, and without the task, which cannot be pickled."""
        self.examples("train")
        return self.__dict__ | {"task": None}

    @abstractmethod
    def make_examples(self, records: Sequence[Record]) -> list[Any]:
        """What the model learns from, or is asked, one for each record."""

    @abstractmethod
    def predict(self, model: nn.Module, split: str) -> list[Any]:
        """What the model says to each record of the split, as the task's metrics read it."""

    @abstractmethod
    def reference(self, record: Record) -> Any:
        """What should be said to a record, as the task's metrics read it."""

    def new_model(self, seed: int) -> nn.Module:
        """The base, a copy of its own, as it is before any method."""
        return copy.deepcopy(self.base.model)

    def method(self, model: nn.Module, chosen: Method) -> Method:
        """The method as it trains on this task."""
        return chosen

    def beside(self, model: nn.Module) -> dict[str, Any]:
        """The files to lie beside an adapter."""
        return {}

    def count(self, split: str) -> int:
        """How many records of a split are used; they are not looked at."""
        return min(len(self.task[split]), getattr(self.settings, f"{split}_records") or len(self.task[split]))

    def records(self, split: str) -> list[Record]:
        """The records of a split, or so many of them as the settings allow: the same for every method."""
        records = list(self.task[split])
        chosen = random.Random(self.settings.task_seed).sample(range(len(records)), self.count(split))
        return [records[i] for i in sorted(chosen)]

    def references(self, split: str) -> list[Any]:
        """What should be said to each record of the split."""
        return [self.reference(record) for record in self.records(split)]

    def perfect(self, split: str) -> list[Any]:
        """Answers to the split that could not be better."""
        return self.references(split)

    def groups(self, split: str) -> list[str] | None:
        """What records of the split are judged together; None if each stands for itself."""
        names = [getattr(record, "group", "") for record in self.records(split)]
        return names if any(names) else None

    def examples(self, split: str) -> list[Any]:
        """The split as the model reads it."""
        if split not in self._examples:
            self._examples[split] = self.make_examples(self.records(split))
        return self._examples[split]

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of examples, with token types only for a base that knows them."""
        config = self.base.model.config
        batch = collate(examples, self.pad_id, config.decoder_start_id)
        return {name: x for name, x in batch.items() if name != "token_types" or config.token_types}

    def batches(self, split: str, size: int = EVALUATED) -> Iterator[dict[str, Tensor]]:
        """Each example once, in order."""
        examples = self.examples(split)
        return (self.collate(examples[i : i + size]) for i in range(0, len(examples), size))

    def loader(self, seed: int) -> "Batches":
        """Endless batches to train on, in the order of this seed."""
        return Batches(self, seed)


class Batches(ExampleLoader):
    """The examples of train, in batches as the problem makes them."""

    def __init__(self, problem: Problem, seed: int):
        super().__init__(problem.examples("train"), problem.settings.batch_size, problem.pad_id, seed)
        self.problem = problem

    def batch(self, rows: Any, mine: slice) -> dict[str, Tensor]:
        return self.problem.collate([self.examples[row] for row in rows[mine]])


class HeadProblem(Problem):
    """A task that a new head answers, which trains beside whatever method."""

    head: str  # of minillm.models.HEADS
    names: tuple[str, ...] = ()  # of what the head says, where the task has no labels

    def __init__(self, base: Loaded, task: Task, config: CompareConfig):
        super().__init__(base, task, config)
        self.labels = self.names or tuple(task.labels)

    def new_model(self, seed: int) -> nn.Module:
        """With a new head, the same for every method that has this seed."""
        model = super().new_model(seed)
        torch.manual_seed(seed)
        return put_new_head(model, HeadConfig(self.head, len(self.labels), **reading(self.kind))).eval()

    def method(self, model: nn.Module, chosen: Method) -> Method:
        return beside_head(model, chosen)

    def beside(self, model: nn.Module) -> dict[str, Any]:
        return describe_head(model, list(self.labels))

    @abstractmethod
    def answers(self, scores: Tensor, examples: Sequence[Any]) -> list[Any]:
        """What the head's scores for these examples say."""

    @torch.no_grad()
    def predict(self, model: nn.Module, split: str) -> list[Any]:
        examples, device = self.examples(split), next(model.parameters()).device
        training, found = model.training, []
        model.eval()
        for start in range(0, len(examples), EVALUATED):
            some = examples[start : start + EVALUATED]
            inputs, named = model_inputs({name: x.to(device) for name, x in self.collate(some).items()})
            found += self.answers(model(*inputs, **named).float().cpu(), some)
        model.train(training)
        return found
