"""What a model is tuned for: to continue texts, or to name their class. Both offer the same to `tune`."""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from minillm.data import Document, ExampleLoader, TokenFile, corpus_summary, example_batches, text_examples
from minillm.data.loader import Loader
from minillm.evaluation import evaluate
from minillm.files import write_json
from minillm.models import HeadConfig
from minillm.peft import Method
from minillm.recipes.common import DataConfig, read_corpus, say, write_data
from minillm.recipes.head import beside_head, describe_head, put_new_head, reading
from minillm.recipes.locate import Loaded
from minillm.recipes.rows import Rows, padded
from minillm.training import Evaluate, Loss, causal_lm_loss, classification_loss, world
from minillm.training.distributed import from_main


class Task(Protocol):
    """What `tune` asks of a task; `measure` gives for each text its values by name, `loss` among them."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Mapping[str, Tensor]], Loss]
    choices: tuple[int, str]  # how many of what a model that learned nothing guesses among

    def method(self, chosen: Method) -> Method: ...
    def loader(self) -> Loader: ...
    def evaluation(self) -> Evaluate: ...
    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]: ...
    def beside(self) -> dict[str, Any]: ...


class Continuation:
    """Continue texts, or complete prompts, with the base's own LM head."""

    loss_fn = staticmethod(causal_lm_loss)

    def __init__(self, run: Path, base: Loaded, data: DataConfig, base_text: Path, resume: bool):
        if not resume:
            from_main(lambda: write_data(run, *read_corpus(data), base.tokenizer))
        file, held_out = (TokenFile.open(run / "data" / side, verify=resume) for side in ("train", "held_out"))
        self.model, self.choices = base.model, (base.model.config.vocab_size, "token")
        self.rows = Rows(file, data, padded(file, data))
        self.texts = {"new text": Rows(held_out, data, self.rows.padded)}
        if base_text.is_dir():  # that of the base's own run shows what was forgotten
            self.texts["the base's text"] = Rows(TokenFile.open(base_text), data)

    def method(self, chosen: Method) -> Method:
        return chosen

    def loader(self) -> Loader:
        return self.rows.loader()

    def evaluation(self) -> Evaluate:
        return self.texts["new text"].evaluation()

    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return {name: rows.measure(model) for name, rows in self.texts.items()}

    def beside(self) -> dict[str, Any]:
        """Nothing to lie beside the adapter: the head is the base's."""
        return {}


class Classification:
    """Name the class of a text with a new head, which trains beside whatever method is chosen."""

    loss_fn = staticmethod(classification_loss)

    def __init__(self, run: Path, base: Loaded, data: DataConfig, resume: bool):
        training, held_out = read_corpus(data)
        self.labels = sorted({document.completion for document in training})
        _check_labels(self.labels, held_out, data)
        head = HeadConfig("classification", len(self.labels), **reading(base.model.config.kind))
        self.model, self.data = put_new_head(base.model, head), data
        self.choices = (len(self.labels), "class")
        self.pad_id = base.tokenizer.pad_id or 0  # a masked position may hold any id
        self.examples = {
            name: text_examples(
                base.tokenizer,
                [document.text for document in documents],
                [self.labels.index(document.completion) for document in documents],
                max_length=data.length,
            )
            for name, documents in (("train", training), ("held_out", held_out))
        }
        if not resume:
            from_main(lambda: self._describe(run, training, held_out))

    def _describe(self, run: Path, training: list[Document], held_out: list[Document]) -> None:
        summary = {name: corpus_summary(d) for name, d in (("train", training), ("held_out", held_out))}
        (run / "data").mkdir(parents=True, exist_ok=True)
        write_json(run / "data" / "corpus.json", {"labels": self.labels, **summary})
        say(f"{len(training):,} texts to learn from, {len(held_out):,} to measure on")
        say(f"classes: {', '.join(self.labels)}")

    def method(self, chosen: Method) -> Method:
        """The same, with the head training beside it."""
        return beside_head(self.model, chosen)

    def loader(self) -> Loader:
        data = self.data
        return ExampleLoader(
            self.examples["train"], data.batch_size, self.pad_id, data.seed, world().rank, world().size
        )

    def evaluation(self) -> Evaluate:
        some = self.data.eval_batches or None
        return Evaluate(lambda model: evaluate(model, islice(self._batches(), some), classification_loss))

    def measure(self, model: nn.Module) -> dict[str, dict[str, float]]:
        return {"new text": evaluate(model, self._batches(), classification_loss)}

    def _batches(self):
        return example_batches(self.examples["held_out"], self.data.batch_size, self.pad_id)

    def beside(self) -> dict[str, Any]:
        return describe_head(self.model, self.labels)


def _check_labels(labels: list[str], held_out: list[Document], data: DataConfig) -> None:
    problems = []
    if len(labels) < 2:
        problems.append(f"a classifier needs two classes at least, and every text has {data.label}={labels[0]!r}")
    if len(labels) > 1000:
        problems.append(f"{len(labels)} different values of {data.label}: is it a class? Give the field that names one")
    if unknown := sorted({d.completion for d in held_out} - set(labels)):
        problems.append(f"held-out texts have classes that no training text has: {', '.join(map(repr, unknown[:8]))}")
    if problems:
        raise ValueError("data.label: " + "; ".join(problems))
