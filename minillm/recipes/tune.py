"""`minillm tune`: adapt a language model to other text with few trained parameters, or all of them."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from minillm.config import to_dict
from minillm.data import TokenFile
from minillm.files import write_json
from minillm.models import Decoder, weights_fingerprint
from minillm.peft import FullConfig, LoraConfig, Method, PartialConfig, Report, save_adapter
from minillm.peft import tune as tune_model
from minillm.recipes.common import (
    DataConfig,
    draw_losses,
    find_run,
    folder_bytes,
    format_table,
    read_corpus,
    report_timing,
    say,
    train,
    write_data,
)
from minillm.recipes.locate import Loaded, load_base, locate, note_untied_head
from minillm.recipes.rows import Rows
from minillm.training import EarlyStopping, ProgressBar, TrainConfig, Trainer, causal_lm_loss, is_main, process_group
from minillm.training.distributed import from_main, pick_device


@dataclass(frozen=True)
class TuneDataConfig(DataConfig):
    """As for pretraining, and how documents fill the rows."""

    batch_size: int = 8
    rows: Literal["auto", "packed", "padded"] = "auto"  # auto: padded, one document a row, if any has a prompt


@dataclass(frozen=True)
class TuneConfig:
    """`minillm tune`. The tokenizer is always the base's. Only the section of the chosen method counts.

    Full tuning usually wants a learning rate a few times smaller than LoRA.
    """

    base: str = ""  # a pretraining run or a model folder
    method: Literal["lora", "full", "partial"] = "lora"
    run: str = ""  # the folder to write; when empty, runs/tune-<date>-<time>
    seed: int = 0  # of the adapter's initial weights
    lora: LoraConfig = field(default_factory=LoraConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)
    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200, weight_decay=0.0, eval_every=50))

    @property
    def chosen(self) -> Method:
        """The config of the chosen method."""
        return {"lora": self.lora, "full": FullConfig(), "partial": self.partial}[self.method]


def tune(config: TuneConfig, resume: bool = False) -> Path:
    """Tune `config.base` by `config.method` on `config.data.train`; returns the run folder.

    The folder holds data/ (token files), checkpoints/, adapter/ (what was trained, and where its base is), plots/ and
    report.json with the held-out loss before and after, also on the base's own held-out text if the base is a run.
    Resuming and torchrun as in `pretrain`. ValueError for whatever cannot work, before training begins.
    """
    if resume and not config.run:
        raise ValueError("which run? Name it: minillm tune run=FOLDER --resume")
    config = dataclasses.replace(config, base=str(_base_folder(config.base)))
    with process_group(config.train.device):
        run = find_run(config, "tune", resume)
        base = load_base(Path(config.base), pick_device(config.train.device))
        _check_length(config, base.model)
        if not resume:
            from_main(lambda: write_data(run, *read_corpus(config.data), base.tokenizer))
        config = dataclasses.replace(config, run=str(run))
        file = TokenFile.open(run / "data" / "train")
        rows = Rows(file, config.data, _padded(file, config.data))
        texts = _measured(run, config, rows.padded)
        before = from_main(lambda: {name: text.measure(base.model) for name, text in texts.items()})
        trainer, report = _trainer(config, run, base, rows, texts["new text"])
        train(trainer, config, "tune", resume)
        if is_main():
            after = {name: text.measure(base.model) for name, text in texts.items()}
            _finish(trainer, config, report, {name: (before[name], after[name]) for name in texts})
    return run


def _base_folder(base: str) -> Path:
    if not base:
        raise ValueError("base: which model? Name a pretraining run or a model folder, for example base=runs/base")
    try:
        kind, folder = locate(base)
    except ValueError as error:
        raise ValueError(f"base: {error}") from None
    if kind == "adapter":
        raise ValueError(
            f"base={base} is tuned already, and tuning needs a whole model. In Python: load(base).model, "
            "minillm.peft.merge(model), minillm.models.save_model(model, folder), and its tokenizer.save(folder)"
        )
    return folder.resolve()


def _check_length(config: TuneConfig, base: Decoder) -> None:
    if config.data.length > base.config.max_positions:
        raise ValueError(
            f"data.length={config.data.length} is more than the base's max_positions={base.config.max_positions}: "
            f"set data.length={base.config.max_positions} or lower"
        )


def _measured(run: Path, config: TuneConfig, padded: bool) -> dict[str, Rows]:
    """The new held-out text, and that of the base's own run, which shows what was forgotten."""
    texts = {"new text": Rows(TokenFile.open(run / "data" / "held_out"), config.data, padded)}
    if (own := Path(config.base).parent / "data" / "held_out").is_dir():
        texts["the base's text"] = Rows(TokenFile.open(own), config.data)
    return texts


def _padded(file: TokenFile, config: TuneDataConfig) -> bool:
    """Whether each document has a row of its own."""
    prompts = bool((file.counted > file.starts).any())
    padded = prompts if config.rows == "auto" else config.rows == "padded"
    why = (
        f"data.rows={config.rows}"
        if config.rows != "auto"
        else "there are prompts"
        if prompts
        else "there are no prompts"
    )
    if padded and config.isolate_documents:
        raise ValueError(f"data.isolate_documents=true is for packed rows, and these are padded ({why}): leave it out")
    kind = "padded rows, one document each" if padded else "packed rows, documents end to end"
    say(f"{kind} ({why}): {file.meta.num_documents:,} documents, {len(file):,} tokens")
    return padded


def _trainer(config: TuneConfig, run: Path, base: Loaded, rows: Rows, held_out: Rows) -> tuple[Trainer, Report]:
    model, tokenizer, _ = base
    identity = {"tokenizer": tokenizer.fingerprint, "base": weights_fingerprint(model), "method": config.method}
    identity |= {"settings": to_dict(config.chosen), "seed": config.seed}
    torch.manual_seed(config.seed)
    report = tune_model(model, config.chosen)
    note_untied_head(model)
    say(f"{report}")
    callbacks = [ProgressBar(f"tuning ({config.method})"), held_out.evaluation(), EarlyStopping()]
    return Trainer(model, causal_lm_loss, rows.loader(), config.train, run, callbacks, identity), report


def _finish(trainer: Trainer, config: TuneConfig, report: Report, measured: dict[str, tuple[dict, dict]]) -> None:
    """Write adapter/, plots/ and report.json: the same again if it is done twice."""
    run = trainer.run_dir
    base = os.path.relpath(config.base, (run / "adapter").resolve())  # so both can be moved together
    save_adapter(trainer.model, run / "adapter", base=base)
    facts: dict[str, Any] = {"method": config.method, "trainable": report.trainable, "total": report.total}
    facts |= {"percent": report.percent, "adapter_bytes": folder_bytes(run / "adapter")}
    facts |= {"held_out": {name: {"before": b, "after": a} for name, (b, a) in measured.items()}}
    write_json(run / "report.json", facts | report_timing(trainer))
    draw_losses(run, f"Tuning ({config.method})")
    rows = [
        (name, when, values["loss"], values["perplexity"], values.get("bits_per_byte", "-"))
        for name, pair in measured.items()
        for when, values in zip(("before", "after"), pair, strict=True)
    ]
    say(format_table(("held-out", "tuning", "loss", "perplexity", "bits per byte"), rows))
    say(f"Saved in {run}. Try it: minillm generate {run} PROMPT --stream")
