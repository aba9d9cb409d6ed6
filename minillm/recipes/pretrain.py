"""`minillm pretrain`: from text to a language model of any of the three kinds."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from minillm.config import seed_flaw, to_dict
from minillm.data import TokenFile
from minillm.files import atomic_folder, write_json
from minillm.models import ModelConfig, count_parameters, save_model
from minillm.recipes.common import (
    DataConfig,
    began_and_ended,
    doubts,
    draw_losses,
    find_run,
    format_table,
    read_corpus,
    report_timing,
    say,
    taken_back_if_refused,
    train,
    write_data,
)
from minillm.recipes.locate import quote
from minillm.recipes.objective import DEFAULTS, KINDS, RATE, DenoisedRows, affixes, make_objective, misfit, new_model
from minillm.recipes.rows import Rows, padded
from minillm.recipes.tokenizer import TokenizerConfig, make_tokenizer
from minillm.tokenizers import Tokenizer, load_tokenizer
from minillm.training import EarlyStopping, ProgressBar, TrainConfig, Trainer, process_group
from minillm.training.distributed import from_main


@dataclass(frozen=True)
class PretrainConfig:
    """`minillm pretrain`. model.vocab_size is set from the tokenizer; leave it out.

    The defaults (about 2 million parameters, 1000 steps of 4096 tokens) take some minutes on two CPU cores.
    """

    run: str = ""  # the folder to write; when empty, runs/pretrain-<date>-<time>
    seed: int = 0  # of the initial weights
    objective: Literal["next", "masked", "spans"] | None = None  # next, masked or spans; none: as model.kind asks
    hide: float = RATE  # of masked and spans: the share of the tokens hidden in training; measured is always 0.15
    whole_words: bool = False  # of masked: hide words with all their pieces
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        if self.objective is None:
            object.__setattr__(self, "objective", DEFAULTS[self.model.kind])  # the one way to finish a frozen dataclass
        wrong = seed_flaw(self.seed) + misfit(self.objective, self.model)
        if self.whole_words and self.objective != "masked":
            wrong.append(f"whole_words=true is for objective=masked, not {self.objective}: leave it out")
        if self.hide != RATE and self.objective == "next":
            wrong.append(f"hide={self.hide} is for objective=masked and spans, not next: leave it out")
        if not 0 < self.hide < 1:
            wrong.append(f"hide={self.hide}: a share between 0 and 1")
        if self.data.isolate_documents and self.objective != "next":
            wrong.append(
                "data.isolate_documents=true is for objective=next; data.rows=padded keeps documents apart too"
            )
        if self.data.length > self.model.max_positions:
            wrong.append(
                f"data.length={self.data.length} is more than model.max_positions={self.model.max_positions}: "
                "shorten the rows or raise the positions"
            )
        if wrong:
            raise ValueError("\n".join(wrong))


def pretrain(config: PretrainConfig, resume: bool = False) -> Path:
    """Train a tokenizer (unless given) and a model on `config.data.train`; returns the run folder.

    A decoder learns to predict the next token; an encoder, tokens that are hidden (with MaskedLM on it); an
    encoder-decoder, spans that are cut out.

    The folder holds tokenizer/, data/ (token files), checkpoints/, model/ (with its tokenizer), report.json and
    plots/. With `resume` an interrupted run goes on exactly, in whatever moment it was killed. The same call works
    under torchrun. ValueError for whatever cannot work, before training begins and without marking the folder as used.
    """
    with process_group(config.train.device):
        run = find_run(config, "pretrain", resume)
        with taken_back_if_refused(run):
            if not resume:
                from_main(lambda: _prepare(run, config))
            tokenizer = load_tokenizer(run / "tokenizer")
            config = _with_vocabulary(dataclasses.replace(config, run=str(run)), tokenizer)
            texts = [TokenFile.open(run / "data" / side, verify=resume) for side in ("train", "held_out")]
            rows, held_out = text_rows(config, tokenizer, texts)
            trainer = _trainer(config, run, tokenizer, rows, held_out)
            train(trainer, config, "pretrain", resume)
        from_main(lambda: _finish(trainer, tokenizer, held_out))
    return run


def _prepare(run: Path, config: PretrainConfig) -> None:
    training, held_out = read_corpus(config.data)
    tokenizer = make_tokenizer(config.tokenizer, training, KINDS[config.objective].symbols)
    with atomic_folder(run / "tokenizer") as folder:
        tokenizer.save(folder)
    write_data(run, training, held_out, tokenizer)


def _with_vocabulary(config: PretrainConfig, tokenizer: Tokenizer) -> PretrainConfig:
    """The config with the tokenizer's vocabulary; another one that was asked for is refused."""
    asked, size = config.model.vocab_size, tokenizer.vocab_size
    if asked not in (size, ModelConfig().vocab_size):
        raise ValueError(
            f"model.vocab_size={asked}, but the tokenizer has {size} ids: leave model.vocab_size out, it is set from "
            "the tokenizer (tokenizer.vocab_size)"
        )
    given = {"vocab_size": size}
    if config.model.kind == "encoder_decoder" and config.model.decoder_start_id == ModelConfig.decoder_start_id:
        given["decoder_start_id"] = tokenizer.pad_id  # as in T5
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **given))


def text_rows(config: PretrainConfig, tokenizer: Tokenizer, texts: Sequence[TokenFile]) -> list[Rows]:
    """The two texts as rows of the objective, for training and for measuring."""
    one_each, loss = padded(texts[0], config.data), KINDS[config.objective].loss
    if config.objective == "next":
        return [Rows(file, config.data, one_each) for file in texts]
    if any((file.counted > file.starts).any() for file in texts):
        raise ValueError(
            f"objective={config.objective} learns from plain text, and data.train has prompts with completions: name "
            "its text with data.text, or train a decoder"
        )
    around = affixes(config.objective, tokenizer)
    if (longest := config.data.length + sum(map(len, around))) > config.model.max_positions:
        raise ValueError(
            f"data.length={config.data.length} and the special tokens around each row make {longest} tokens, more than "
            f"model.max_positions={config.model.max_positions}: shorten the rows or raise the positions"
        )
    named = config.objective, tokenizer, config.model, config.data.length
    objectives = [make_objective(*named, words=config.whole_words, rate=rate) for rate in (config.hide, RATE)]
    return [
        DenoisedRows(file, config.data, one_each, loss, objective, tokenizer, around)
        for file, objective in zip(texts, objectives, strict=True)
    ]


def _trainer(config: PretrainConfig, run: Path, tokenizer: Tokenizer, rows: Rows, held_out: Rows) -> Trainer:
    torch.manual_seed(config.seed)
    model = new_model(config.model)
    model.tokenizer_fingerprint = tokenizer.fingerprint
    seen = config.train.steps * config.train.accumulate * config.data.batch_size  # rows
    times = seen / rows.file.meta.num_documents if rows.padded else seen * config.data.length / len(rows.file)
    say(f"{tokenizer}; model.vocab_size is set to {tokenizer.vocab_size}")
    say(f"{count_parameters(model)['total']:,} parameters; training sees {seen:,} rows, {times:.1f} times the text")
    callbacks = [held_out.evaluation(), EarlyStopping(), ProgressBar("pretraining")]
    identity = {"tokenizer": tokenizer.fingerprint, "model": to_dict(config.model), "seed": config.seed}
    return Trainer(model, rows.loss_fn, rows.loader(), config.train, run, callbacks, identity)


def _finish(trainer: Trainer, tokenizer: Tokenizer, held_out: Rows) -> None:
    """Write model/, plots/ and report.json from the trained model: the same again if it is done twice."""
    run, model = trainer.run_dir, trainer.model
    with atomic_folder(run / "model") as folder:
        save_model(model, folder)
        tokenizer.save(folder)
    values = held_out.measure(model)
    draw_losses(run, "Pretraining")
    report = {"held_out": values, **report_timing(trainer), "parameters": count_parameters(model)}
    report["warnings"] = doubts(*began_and_ended(run), values["loss"], tokenizer.vocab_size)
    write_json(run / "report.json", report)
    names = [name for name in ("loss", "perplexity", "bits_per_byte", "tokens") if name in values]
    say(format_table([f"held-out {name.replace('_', ' ')}" for name in names], [[values[name] for name in names]]))
    tried = f"minillm tune base={quote(run)} data.train=FILE data.label=FIELD"
    if trainer.model.config.kind == "decoder":
        tried = f"minillm generate {quote(run)} PROMPT --stream"
    say(f"Saved in {run}. Try it: {tried}")
