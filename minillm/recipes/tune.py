"""`minillm tune`: adapt a language model to other text with few trained parameters, or all of them."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from minillm.config import seed_flaw, to_dict
from minillm.data import TokenFile
from minillm.files import atomic_folder, write_json
from minillm.models import Decoder, save_model, weights_fingerprint
from minillm.peft import FullConfig, LoraConfig, Method, PartialConfig, Report, merge, save_adapter
from minillm.peft import tune as tune_model
from minillm.recipes.common import (
    DataConfig,
    doubts,
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
from minillm.recipes.locate import Loaded, load, load_base, locate, note_untied_head, quote
from minillm.recipes.rows import Rows, padded
from minillm.training import EarlyStopping, ProgressBar, TrainConfig, Trainer, causal_lm_loss, process_group
from minillm.training.distributed import from_main, pick_device

MERGEABLE = ("lora", "full", "partial")


@dataclass(frozen=True)
class TuneDataConfig(DataConfig):
    """As for pretraining, with fewer rows in a batch."""

    batch_size: int = 8


@dataclass(frozen=True)
class TuneConfig:
    """`minillm tune`. The tokenizer is always the base's. Only the section of the chosen method counts.

    Full tuning usually wants a learning rate a few times smaller than LoRA.
    """

    base: str = ""  # a run or a model folder; an adapter is merged into its base first, in run/base
    method: Literal["lora", "full", "partial"] = "lora"
    run: str = ""  # the folder to write; when empty, runs/tune-<date>-<time>
    seed: int = 0  # of the adapter's initial weights
    lora: LoraConfig = field(default_factory=LoraConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)
    data: TuneDataConfig = field(default_factory=TuneDataConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=200, weight_decay=0.0, eval_every=50))

    def __post_init__(self):
        wrong = seed_flaw(self.seed)
        for name, section in (("lora", self.lora), ("partial", self.partial)):
            if name != self.method and section != type(section)():
                wrong.append(f"method={self.method} uses no key of {name}: leave {name}.* out, or choose method={name}")
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def chosen(self) -> Method:
        """The config of the chosen method."""
        return {"lora": self.lora, "full": FullConfig(), "partial": self.partial}[self.method]


def tune(config: TuneConfig, resume: bool = False) -> Path:
    """Tune `config.base` by `config.method` on `config.data.train`; returns the run folder.

    The folder holds data/ (token files), checkpoints/, adapter/ (what was trained, and where its base is), plots/ and
    report.json with the held-out loss before and after, also on the base's own held-out text if the base is a run;
    and base/, if `config.base` was tuned itself and had to be merged.
    Resuming and torchrun as in `pretrain`. ValueError for whatever cannot work, before training begins.
    """
    if resume and not config.run:
        raise ValueError("which run? Name it: minillm tune run=FOLDER --resume")
    config = dataclasses.replace(config, base=str(_located(config.base)))
    with process_group(config.train.device):
        run = find_run(config, "tune", resume)
        folder = from_main(lambda: _whole_base(Path(config.base), run, resume))
        base = load_base(folder, pick_device(config.train.device))
        if not isinstance(base.model, Decoder):
            raise ValueError(
                f"{folder} is an encoder-decoder, which learns from pairs of texts: tune takes decoders; "
                "train this one in Python, with minillm.training.Trainer and seq2seq_loss"
            )
        _check_length(config, base.model)
        if not resume:
            from_main(lambda: write_data(run, *read_corpus(config.data), base.tokenizer))
        config = dataclasses.replace(config, run=str(run))
        file, held_out = (TokenFile.open(run / "data" / side, verify=resume) for side in ("train", "held_out"))
        rows = Rows(file, config.data, padded(file, config.data))
        texts = _measured(config, Rows(held_out, config.data, rows.padded))
        before = from_main(lambda: {name: text.measure(base.model) for name, text in texts.items()})
        trainer, report = _trainer(config, run, base, rows, texts["new text"])
        train(trainer, config, "tune", resume)
        from_main(lambda: _finish(trainer, config, report, folder, texts, before))
    return run


def _located(base: str) -> Path:
    if not base:
        raise ValueError("base: which model? Name a run or a model folder, for example base=runs/base")
    try:
        return locate(base).folder.resolve()
    except ValueError as error:
        raise ValueError(f"base: {error}") from None


def _whole_base(base: Path, run: Path, resume: bool) -> Path:
    """The folder `base`, or if that holds an adapter `run/base`, with the adapter merged into its base."""
    if locate(base).kind == "model":
        return base
    whole = run / "base"
    if not (resume and whole.is_dir()):
        model, tokenizer, report = load(base)
        if report.method not in MERGEABLE:
            raise ValueError(f"base={base} is tuned by {report.method}, which cannot be merged into its base")
        merge(model)
        with atomic_folder(whole) as folder:
            save_model(model, folder)
            tokenizer.save(folder)
        say(f"{base} ({report.method}) is merged into its base; the whole model is in {whole}")
    return whole


def _check_length(config: TuneConfig, base: Decoder) -> None:
    if config.data.length > base.config.max_positions:
        raise ValueError(
            f"data.length={config.data.length} is more than the base's max_positions={base.config.max_positions}: "
            f"set data.length={base.config.max_positions} or lower"
        )


def _measured(config: TuneConfig, held_out: Rows) -> dict[str, Rows]:
    """The new held-out text, and that of the base's own run, which shows what was forgotten."""
    texts = {"new text": held_out}
    if (own := Path(config.base).parent / "data" / "held_out").is_dir():
        texts["the base's text"] = Rows(TokenFile.open(own), config.data)
    return texts


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


def _finish(
    trainer: Trainer, config: TuneConfig, report: Report, base: Path, texts: dict[str, Rows], before: dict[str, dict]
) -> None:
    """Measure, write adapter/, plots/ and report.json: the same again if it is done twice."""
    run = trainer.run_dir
    measured = {name: (before[name], text.measure(trainer.model)) for name, text in texts.items()}
    place = os.path.relpath(base.resolve(), (run / "adapter").resolve())  # so both can be moved together
    save_adapter(trainer.model, run / "adapter", base=place)
    facts: dict[str, Any] = {"method": config.method, "trainable": report.trainable, "total": report.total}
    facts |= {"percent": report.percent, "adapter_bytes": folder_bytes(run / "adapter")}
    facts |= {"held_out": {name: {"before": b, "after": a} for name, (b, a) in measured.items()}}
    first, last = (values["loss"] for values in measured["new text"])
    facts["warnings"] = doubts(first, last, last, trainer.model.config.vocab_size)
    write_json(run / "report.json", facts | report_timing(trainer))
    draw_losses(run, f"Tuning ({config.method})")
    rows = [
        (name, when, values["loss"], values["perplexity"], values.get("bits_per_byte", "-"))
        for name, pair in measured.items()
        for when, values in zip(("before", "after"), pair, strict=True)
    ]
    say(format_table(("held-out", "tuning", "loss", "perplexity", "bits per byte"), rows))
    say(f"Saved in {run}. Try it: minillm generate {quote(run)} PROMPT --stream")
