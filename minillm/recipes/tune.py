"""`minillm tune`: adapt a language model to other text, or to a task, with few trained parameters, or all of them."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from minillm.config import seed_flaw, to_dict
from minillm.files import atomic_folder, write_json
from minillm.models import Decoder, save_model, weights_fingerprint
from minillm.peft import METHODS, CannotMerge, Method, Report, merge, save_adapter
from minillm.peft import tune as tune_model
from minillm.recipes.common import (
    DataConfig,
    doubts,
    draw_losses,
    find_run,
    folder_bytes,
    format_table,
    report_timing,
    say,
    train,
)
from minillm.recipes.locate import load, load_base, locate, note_untied_head, quote
from minillm.recipes.tasks import Classification, Continuation, Task
from minillm.training import EarlyStopping, ProgressBar, RankGrowth, TrainConfig, Trainer, process_group
from minillm.training.distributed import from_main, pick_device


@dataclass(frozen=True)
class TuneDataConfig(DataConfig):
    """As for pretraining, with fewer rows in a batch."""

    batch_size: int = 8


@dataclass(frozen=True)
class _TuneConfig:
    """All of TuneConfig but the methods' sections."""

    base: str = ""  # a run or a model folder; an adapter is merged into its base first, in run/base
    method: Literal[tuple(METHODS)] = "lora"  # minillm methods says what they are
    run: str = ""  # the folder to write; when empty, runs/tune-<date>-<time>
    seed: int = 0  # of the adapter's initial weights
    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200, weight_decay=0.0, eval_every=50))

    def __post_init__(self):
        wrong = seed_flaw(self.seed)
        for name in SECTIONS:
            section = getattr(self, name)
            if name != self.method and section != type(section)():
                wrong.append(f"method={self.method} uses no key of {name}: leave {name}.* out, or choose method={name}")
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def chosen(self) -> Method:
        """The config of the chosen method."""
        return getattr(self, self.method) if self.method in SECTIONS else METHODS[self.method]()


SECTIONS = {name: method for name, method in METHODS.items() if dataclasses.fields(method)}
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


def tune(config: TuneConfig, resume: bool = False) -> Path:
    """Tune `config.base` by `config.method` on `config.data.train`; returns the run folder.

    With `data.label` the model learns to name the class of a text, with a new head that trains beside the method;
    otherwise to continue texts. The folder holds data/, checkpoints/, adapter/ (what was trained, and where its base
    is), plots/ and report.json with what was measured on held-out text before and after, also on the base's own
    held-out text if the base is a run; and base/, if `config.base` was tuned itself and had to be merged.
    Resuming and torchrun as in `pretrain`. ValueError for whatever cannot work, before training begins.
    """
    if resume and not config.run:
        raise ValueError("which run? Name it: minillm tune run=FOLDER --resume")
    config = dataclasses.replace(config, base=str(_located(config.base)))
    with process_group(config.train.device):
        run = find_run(config, "tune", resume)
        folder = from_main(lambda: _whole_base(Path(config.base), run, resume, writes=not config.data.label))
        config = dataclasses.replace(config, run=str(run))
        torch.manual_seed(config.seed)
        task, identity = _task(config, run, folder, resume)
        before = from_main(lambda: task.measure(task.model))
        trainer, report = _trainer(config, run, task, identity)
        train(trainer, config, "tune", resume)
        from_main(lambda: _finish(trainer, config, report, folder, task, before))
    return run


def _task(config: TuneConfig, run: Path, folder: Path, resume: bool) -> tuple[Task, dict[str, Any]]:
    """What the model is tuned for, and what must be the same when the run is resumed."""
    base = load_base(folder, pick_device(config.train.device), writes=not config.data.label)
    identity = {"tokenizer": base.tokenizer.fingerprint, "base": weights_fingerprint(base.model)}
    _check_length(config, base.model)
    if config.data.label:
        return Classification(run, base, config.data, resume), identity
    if not isinstance(base.model, Decoder):
        raise ValueError(
            f"{folder} is an encoder-decoder, which learns from pairs of texts: tune takes decoders, or with "
            "data.label any model; train this one in Python, with minillm.training.Trainer and seq2seq_loss"
        )
    return Continuation(run, base, config.data, Path(config.base).parent / "data" / "held_out", resume), identity


def _located(base: str) -> Path:
    if not base:
        raise ValueError("base: which model? Name a run or a model folder, for example base=runs/base")
    try:
        return locate(base).folder.resolve()
    except ValueError as error:
        raise ValueError(f"base: {error}") from None


def _whole_base(base: Path, run: Path, resume: bool, *, writes: bool) -> Path:
    """The folder `base`, or if that holds an adapter `run/base`, with the adapter merged into its base."""
    if locate(base).kind == "model":
        return base
    whole = run / "base"
    if not (resume and whole.is_dir()):
        model, tokenizer, report, _ = load(base, writes=writes)
        try:
            merge(model)
        except CannotMerge as error:
            raise ValueError(f"base={base} is an adapter, to be merged into its base first: {error}") from None
        with atomic_folder(whole) as folder:
            save_model(model, folder)
            tokenizer.save(folder)
        say(f"{base} ({report.method}) is merged into its base; the whole model is in {whole}")
    return whole


def _check_length(config: TuneConfig, base: Any) -> None:
    taken = config.chosen.positions
    if config.data.length > (room := base.config.max_positions - taken):
        less = f", of which {config.method} takes {taken}" if taken else ""
        raise ValueError(
            f"data.length={config.data.length} is more than the base's max_positions={base.config.max_positions}"
            f"{less}: set data.length={room} or lower"
        )


def _trainer(config: TuneConfig, run: Path, task: Task, identity: dict[str, Any]) -> tuple[Trainer, Report]:
    method = task.method(config.chosen)
    identity |= {"method": config.method, "settings": to_dict(method), "seed": config.seed}
    torch.manual_seed(config.seed)
    report = tune_model(task.model, method)
    note_untied_head(task.model)
    say(f"{report}")
    growth = [RankGrowth(task.model)] if method.callback == "RankGrowth" else []
    for callback in growth:
        callback.allocator.check_steps(config.train.steps)  # now, before the run begins
    callbacks = [ProgressBar(f"tuning ({config.method})"), task.evaluation(), EarlyStopping(), *growth]
    return Trainer(task.model, task.loss_fn, task.loader(), config.train, run, callbacks, identity), report


def _finish(
    trainer: Trainer, config: TuneConfig, report: Report, base: Path, task: Task, before: dict[str, dict]
) -> None:
    """Measure, write adapter/, plots/ and report.json: the same again if it is done twice."""
    run = trainer.run_dir
    after = task.measure(trainer.model)
    place = os.path.relpath(base.resolve(), (run / "adapter").resolve())  # so both can be moved together
    save_adapter(trainer.model, run / "adapter", base=place, beside=task.beside())
    facts: dict[str, Any] = {"method": config.method, "trainable": report.trainable, "total": report.total}
    facts |= {"percent": report.percent, "adapter_bytes": folder_bytes(run / "adapter")}
    facts |= {"held_out": {name: {"before": before[name], "after": after[name]} for name in after}}
    first, last = before["new text"]["loss"], after["new text"]["loss"]
    facts["warnings"] = doubts(first, last, last, *task.choices)
    write_json(run / "report.json", facts | report_timing(trainer))
    draw_losses(run, f"Tuning ({config.method})")
    columns = [name for name in ("loss", "accuracy", "perplexity", "bits_per_byte") if name in after["new text"]]
    rows = [
        (name, when, *(values.get(column, "-") for column in columns))
        for name in after
        for when, values in (("before", before[name]), ("after", after[name]))
    ]
    say(format_table(("held-out", "tuning", *(column.replace("_", " ") for column in columns)), rows))
    command = f"classify {quote(run)} TEXT" if config.data.label else f"generate {quote(run)} PROMPT --stream"
    say(f"Saved in {run}. Try it: minillm {command}")
