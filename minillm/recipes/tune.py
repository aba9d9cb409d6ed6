"""`minillm tune`: adapt a language model to other text, or to a task, with few trained parameters, or all of them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm.config import to_dict
from minillm.files import write_json
from minillm.models import Decoder, weights_fingerprint
from minillm.models.heads import Head
from minillm.peft import Report, save_adapter, tunings_of
from minillm.peft import tune as tune_model
from minillm.peft.doors import positions_taken
from minillm.peft.names import DEFAULT
from minillm.recipes.common import (
    doubts,
    draw_losses,
    find_run,
    folder_bytes,
    format_table,
    report_timing,
    say,
    taken_back_if_refused,
    train,
)
from minillm.recipes.foundation import UNDER, find_foundation, load_bottlenecks, put_adapters, put_base
from minillm.recipes.locate import load_base, locate, note_untied_head, quote, relative_to
from minillm.recipes.prune import choose_entries
from minillm.recipes.tasks import Classification, Continuation, Task
from minillm.recipes.tune_config import TuneConfig
from minillm.recipes.under import describe_under
from minillm.training import EarlyStopping, ProgressBar, RankGrowth, Trainer, process_group
from minillm.training.distributed import from_main, pick_device


def tune(config: TuneConfig, resume: bool = False) -> Path:
    """Tune `config.base` by `config.method` on `config.data.train`; returns the run folder.

    With `data.label` the model learns to name the class of a text, with a new head that trains beside the method;
    otherwise to continue texts. The folder holds data/, checkpoints/, adapter/ (what was trained, and where its base
    is), plots/ and report.json with what was measured on held-out text before and after, also on the base's own
    held-out text if the base is a run. Further, base/ if `config.base` was tuned itself and could be merged, under/
    with the adapters that it stands on if not, or that it fuses, and kept.json with the entries that pruned BitFit
    kept. Resuming and torchrun as in `pretrain`. ValueError for whatever cannot work, before training begins.
    """
    if resume and not config.run:
        raise ValueError("which run? Name it: minillm tune run=FOLDER --resume")
    config = dataclasses.replace(config, base=str(_located(config.base)))
    with process_group(config.train.device):
        run = find_run(config, "tune", resume)
        config = dataclasses.replace(config, run=str(run))
        with taken_back_if_refused(run):
            trainer, report, task, folder, before = _prepare(config, run, resume)
            train(trainer, config, "tune", resume)
        from_main(lambda: _finish(trainer, config, report, folder, task, before))
    return run


def _prepare(config: TuneConfig, run: Path, resume: bool) -> tuple[Trainer, Report, Task, Path, dict[str, Any]]:
    """All that comes before training; last what was measured before it."""
    base, writes = Path(config.base), not config.data.label
    folder, stacks = from_main(lambda: find_foundation(base, run, resume, writes=writes))
    if stacks and config.adapters:
        raise ValueError(
            f"base={base} is an adapter that cannot be merged, and adapters are fused on a whole model only"
        )
    fused = load_bottlenecks(config.adapters, folder) if config.adapters and not resume else {}
    torch.manual_seed(config.seed)
    task, identity = _task(config, run, folder, resume)
    if stacks:
        put_base(task.model, base, run, folder, resume, writes=writes)
        _check_copies(config, task.model)
    _check_length(config, task.model)
    before = from_main(lambda: task.measure(task.model))
    if config.adapters:
        put_adapters(task.model, fused, run, folder, resume)
    trainer, report = _trainer(config, run, task, identity, resume)
    return trainer, report, task, folder, before


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


def _check_copies(config: TuneConfig, model: nn.Module) -> None:
    """Full tuning would train an adapter's own copies of weights, such as biases, along with the base."""
    owners = [tuning.config.name for tuning in tunings_of(model).values() if tuning.slots]
    if owners and not config.chosen.keeps_base:
        raise ValueError(
            f"base={config.base} stays on its base as {', '.join(owners)}, with weights of its own which method="
            f"{config.method} would train as well: choose another method"
        )


def _check_length(config: TuneConfig, base: Any) -> None:
    body = base.body if isinstance(base, Head) else base
    taken = {config.method: config.chosen.positions, "base": positions_taken(body)}
    if config.data.length > (room := base.config.max_positions - sum(taken.values())):
        less = "".join(f", of which {what} takes {count}" for what, count in taken.items() if count)
        raise ValueError(
            f"data.length={config.data.length} is more than the base's max_positions={base.config.max_positions}"
            f"{less}: set data.length={room} or lower"
        )


def _trainer(
    config: TuneConfig, run: Path, task: Task, identity: dict[str, Any], resume: bool
) -> tuple[Trainer, Report]:
    if config.method == "pruned_bitfit":
        method = choose_entries(task, config.pruned_bitfit, config.train, run, resume)
    else:
        method = task.method(config.chosen)
    identity |= {"method": config.method, "settings": to_dict(method), "seed": config.seed}
    torch.manual_seed(config.seed)
    report = tune_model(task.model, method)
    note_untied_head(task.model)
    say(f"{report}")
    growth = [RankGrowth(task.model, DEFAULT)] if method.callback == "RankGrowth" else []
    for callback in growth:
        callback.allocator.check_steps(config.train.steps)  # now, before the run begins
    # The bar comes last: what refuses to start does so on a line of its own.
    callbacks = [task.evaluation(), EarlyStopping(), *growth, ProgressBar(f"tuning ({config.method})")]
    return Trainer(task.model, task.loss_fn, task.loader(), config.train, run, callbacks, identity), report


def _finish(
    trainer: Trainer, config: TuneConfig, report: Report, base: Path, task: Task, before: dict[str, dict]
) -> None:
    """Measure, write adapter/, plots/ and report.json: the same again if it is done twice."""
    run = trainer.run_dir
    after = task.measure(trainer.model)
    adapter = run / "adapter"
    under = [run / UNDER / name for name in tunings_of(trainer.model) if name != DEFAULT]
    beside = task.beside() | describe_under(adapter, under)
    save_adapter(trainer.model, adapter, DEFAULT, base=relative_to(base, adapter), beside=beside)
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
