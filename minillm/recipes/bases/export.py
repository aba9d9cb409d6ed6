"""`minillm bases export`: a finished run as a model in the box, small, with its tokenizer and a card of how it came."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minillm.data import TokenFile
from minillm.evaluation.baselines import NGrams, Unigram, bits_per_byte
from minillm.files import atomic_folder, atomic_write, read_json, write_json
from minillm.models import load, save_model
from minillm.recipes.bases.card import CARD, write_card
from minillm.recipes.common import saved_config, say
from minillm.recipes.objective import DenoisedRows
from minillm.recipes.pretrain import PretrainConfig, text_rows
from minillm.recipes.rows import Rows
from minillm.tokenizers import load_tokenizer
from minillm.training import Records

ORDER = 5  # of the n-grams to beat


@dataclass(frozen=True)
class ExportConfig:
    """`minillm bases export`."""

    run: str = ""  # a finished run of minillm pretrain
    manifest: str = ""  # manifest.json of the text it was trained on, that minillm bases prepare wrote
    name: str = ""  # of the model
    out: str = "data/models"  # the folder in which the model gets one of its name


def export(config: ExportConfig) -> Path:
    """Write the run's model in bfloat16, its tokenizer and its card; returns the folder.

    The held-out works are measured before and after rounding, and beside baselines on the very same pieces.
    ValueError where the run is not finished, or was trained on other text than the manifest's.
    """
    if missing := [name for name in ("run", "manifest", "name") if not getattr(config, name)]:
        raise ValueError("; ".join(f"{name}=: give it" for name in missing))
    run, manifest = Path(config.run), read_json(config.manifest)
    trained = saved_config(PretrainConfig, run, "pretrain")
    if not (run / "report.json").is_file():
        raise ValueError(f"{run} has not finished: minillm pretrain run={run} --resume")
    corpus = read_json(run / "data" / "corpus.json")
    if other := [side for side in corpus if corpus[side]["sha256"] != manifest.get(side, {}).get("sha256")]:
        raise ValueError(f"{config.manifest} is not of the text of {run}: another {' and another '.join(other)}")
    model, tokenizer = load(run / "model"), load_tokenizer(run / "model")
    files = [TokenFile.open(run / "data" / side, verify=True) for side in ("train", "held_out")]
    rows = text_rows(trained, tokenizer, files)[1]
    facts = {"held_out": rows.measure(model)}
    rounded = model.to(torch.bfloat16)
    facts["held_out_in_bfloat16"] = rows.measure(rounded.to(torch.float32))
    facts["baselines_bits_per_byte"] = baselines(files[0], rows)
    if trained.objective == "next":  # of pieces here and there a compressor could say nothing
        facts["baselines_bits_per_byte"] |= manifest["compressed_bits_per_byte"]
    facts |= _story(run, trained)
    folder = Path(config.out) / config.name
    with atomic_folder(folder) as temporary:
        save_model(rounded.to(torch.bfloat16), temporary / "model")
        for file in (temporary / "model").iterdir():
            file.rename(temporary / file.name)
        (temporary / "model").rmdir()
        tokenizer.save(temporary)
        atomic_write(temporary / "works.tsv", works_table(manifest))
        write_json(temporary / CARD, facts)
        write_card(temporary, config.name, model.config, facts, manifest)
    size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"{folder}: {size:,} bytes, {facts['held_out_in_bfloat16']['bits_per_byte']:.3f} bits per byte; baselines:")
    for name, value in facts["baselines_bits_per_byte"].items():
        say(f"  {name}: {value:.3f}")
    return folder


def baselines(training: TokenFile, rows: Rows) -> dict[str, float]:
    """Bits per byte of the pieces that the model was asked for, by models that see only what stands on their left."""
    size, tokens = training.meta.vocab_size, np.asarray(rows.file.tokens)
    if isinstance(rows, DenoisedRows):
        places, num_bytes = rows.text_places(), rows.text_bytes()
    else:
        places, num_bytes = np.arange(1, len(tokens)), rows.file.meta.counted_bytes  # the first is never asked for
    models = {
        "unigram": Unigram(np.asarray(training.tokens), size),
        f"{ORDER}-gram (Kneser-Ney)": NGrams(np.asarray(training.tokens), size, ORDER),
    }
    return {name: bits_per_byte(model.log_probs(tokens)[places], num_bytes) for name, model in models.items()}


def _story(run: Path, trained: PretrainConfig) -> dict[str, Any]:
    """What was done, where, and how the loss fell: 50 points of the training loss, each a mean since the one before."""
    report, environment = read_json(run / "report.json"), read_json(run / "environment.json")
    records = Records(run / "metrics.jsonl").read()
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    parts = np.array_split(np.array(losses), min(50, len(losses)))
    curve = [[int(part[-1, 0]), round(float(part[:, 1].mean()), 4)] for part in parts]
    measured = [[record["step"], round(record["eval"]["loss"], 4)] for record in records if "eval" in record]
    described = {"steps": report["steps"], "labels": report["tokens"], "seconds": round(report["seconds"])}
    settings = {name: getattr(trained.train, name) for name in ("lr", "warmup_ratio", "weight_decay", "precision")}
    rows = {"length": trained.data.length, "batch_size": trained.data.batch_size}
    rows |= {"hide": trained.hide} if trained.objective != "next" else {}
    return {
        "objective": trained.objective,
        "training": described | rows | settings,
        "environment": environment,
        "training_loss": curve,
        "held_out_loss": measured,
    }


def works_table(manifest: dict[str, Any]) -> str:
    """All works as tab-separated lines."""
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
    writer.writerow(("side", "title", "source", "licence", "sha256", "bytes"))
    for side in ("train", "held_out"):
        writer.writerows((side, *work.values()) for work in manifest[side]["works"])
    return table.getvalue()
