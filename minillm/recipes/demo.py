"""The main job from beginning to end: text -> tokenizer -> pretrained decoder -> three ways of tuning it -> report."""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from minillm.config import seed_flaw, to_dict
from minillm.data import (
    Document,
    PackedLoader,
    TokenFile,
    corpus_summary,
    sequential_batches,
    split_documents,
    write_tokens,
)
from minillm.evaluation import language_model_loss
from minillm.files import atomic_folder, write_json
from minillm.models import Decoder, ModelConfig, build, count_parameters, load_model, save_model
from minillm.peft import FullConfig, LoraConfig, PartialConfig, load_adapter, merge, save_adapter, tune
from minillm.peft.method import Method
from minillm.recipes import demo_plots, demo_report
from minillm.recipes.corpora import python_documentation, standard_library_source
from minillm.tokenizers import SentencePieceTokenizer, Tokenizer
from minillm.training import ProgressBar, TrainConfig, Trainer, causal_lm_loss, create_run_folder
from minillm.training.run_folder import peak_memory

DOMAINS = {"documentation": "Python's documentation, in English", "source": "Python's library, in Python"}
SENTENCE = "A generator returns an iterator object."
PROMPT = "def read(self,"  # no space after it: the next piece brings its own


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What `minillm demo` does. The defaults take about two minutes and 0.5 GB on two cores of a laptop.

    LoRA's learning rate is five times that of full fine-tuning: B starts at zero and few values have far to go.
    Initial weights have a spread of 0.05 instead of GPT-2's 0.02: this model is 128 wide and not 768.
    """

    run: str = ""  # the run folder; empty: runs/demo-<date>-<time>
    characters: int = 2_000_000  # of each domain
    held_out: float = 0.05  # share of each domain, in whole documents, that no training sees
    length: int = 128  # tokens of context
    batch_size: int = 8
    model: ModelConfig = ModelConfig(
        vocab_size=2048, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, max_positions=512, init_std=0.05
    )
    pretrain: TrainConfig = TrainConfig(steps=800, lr=4e-3, save_every=0, eval_every=0, device="cpu")
    tune: TrainConfig = TrainConfig(steps=250, lr=2e-3, save_every=0, eval_every=0, device="cpu")
    lora: LoraConfig = LoraConfig(rank=8, alpha=16.0, targets=("all-linear",))
    lora_lr: float = 1e-2
    new_tokens: int = 40  # of each sample
    seed: int = 0

    def __post_init__(self):
        wrong = seed_flaw(self.seed)
        if self.length > self.model.max_positions:
            wrong.append(f"length={self.length} is more than model.max_positions={self.model.max_positions}")
        for section in ("pretrain", "tune"):
            if getattr(self, section).eval_every:  # patience needs it too
                wrong.append(
                    f"{section}.eval_every has no effect: the demo measures when a training is over; leave it 0"
                )
        if wrong:
            raise ValueError("\n".join(wrong))

    def methods(self) -> dict[str, tuple[Method, TrainConfig]]:
        """name -> what trains, and how."""
        return {
            "LoRA": (self.lora, dataclasses.replace(self.tune, lr=self.lora_lr)),
            "full": (FullConfig(), self.tune),
            "head only": (PartialConfig(modules=("lm_head",), untie=self.model.tie_embeddings), self.tune),
        }


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What one way of tuning did."""

    method: str
    trainable: int
    parameters: int  # of the base
    losses: dict[str, float]  # by domain, held out
    seconds: float
    peak_memory: int | None  # bytes, of the whole process; None where it cannot be measured
    memory_before: int | None  # bytes, of the process with the model loaded, before the first step
    artefact_bytes: int


def demo(config: DemoConfig, say: Callable[[str], None] = print) -> Path:
    """Run all of it; returns the run folder, which holds report.html, report.md, report.json and everything else."""
    started = time.perf_counter()
    run = Path(config.run or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    create_run_folder(run, {"recipe": "demo", "config": to_dict(config)})
    torch.manual_seed(config.seed)

    say("1. Text that every Python has, split into whole documents")
    texts = {
        "documentation": (documentation := python_documentation(config.characters)),
        "source": standard_library_source(config.characters, without=documentation),
    }
    splits = {name: split_documents(documents, config.held_out, config.seed) for name, documents in texts.items()}
    corpora = {name: _describe(name, splits[name], say) for name in DOMAINS}

    say("\n2. A tokenizer, trained on the documentation")
    tokenizer = SentencePieceTokenizer.train((d.text for d in splits["documentation"][0]), config.model.vocab_size)
    tokenizer.save(run / "tokenizer")
    say(f"   {SENTENCE!r} becomes {' '.join(tokenizer.pieces(SENTENCE))}\n   ids {tokenizer.encode(SENTENCE)}")
    files = {
        f"{name} {part}": write_tokens(documents, tokenizer, run / "data" / f"{name}-{part}")
        for name, split in splits.items()
        for part, documents in zip(("training", "held-out"), split, strict=True)
    }

    say("\n3. A decoder, pretrained on the documentation")
    base, seconds = _pretrain(config, tokenizer, files["documentation training"], run)
    before = _losses(base, run, config)
    say("   held-out loss: " + _listed(before))

    say("\n4. Three ways to tune it to source code, from the same start, each in a process of its own")
    tuned = []
    for name in config.methods():
        tuned.append(_in_a_new_process(_tune, config, run, name))
        say(f"   {name}: {_listed(tuned[-1].losses)}")

    say("\n5. Saving, loading and merging the LoRA")
    adapted, merged_difference = _reload_and_merge(run)
    say(f"   largest difference between merged and unmerged logits: {merged_difference:.2e}")

    facts = {
        "corpora": corpora,
        "tokenizer": {
            "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint,
            "sentence": SENTENCE, "pieces": tokenizer.pieces(SENTENCE), "ids": tokenizer.encode(SENTENCE),
            "characters_per_token": {n: f.meta.characters / len(f) for n, f in files.items() if "held-out" in n},
        },
        "base": {"parameters": count_parameters(base), "losses": before, "seconds": seconds},
        "methods": demo_report.rows(before, [dataclasses.asdict(method) for method in tuned]),
        "merged_minus_unmerged": merged_difference,
        "samples": demo_report.samples(base, adapted, tokenizer, PROMPT, config.new_tokens, config.seed),
    }  # fmt: skip
    demo_plots.draw(run, base, adapted, tokenizer, SENTENCE, PROMPT, list(config.methods()), facts)
    facts["seconds"] = time.perf_counter() - started
    facts["peak_memory"] = max([peak_memory(torch.device("cpu")) or 0, *(method.peak_memory or 0 for method in tuned)])
    write_json(run / "report.json", facts)
    demo_report.write(run)
    say("\n6. Results\n\n" + demo_report.as_text(facts))
    say(f"\n{facts['seconds']:.0f} s in all. Everything is in {run}; open {run / 'report.html'}")
    return run


def _describe(name: str, split: tuple[list[Document], list[Document]], say: Callable[[str], None]) -> dict[str, Any]:
    found = {"what": DOMAINS[name], "training": corpus_summary(split[0]), "held_out": corpus_summary(split[1])}
    for part in ("training", "held_out"):
        facts = found[part]
        say(
            f"   {name:13} {part.replace('_', '-'):8} {facts['documents']:5,} documents {facts['bytes']:9,} bytes "
            f"{facts['characters']:9,} characters, sha256 {facts['sha256'][:12]}"
        )
    return found


def _pretrain(config: DemoConfig, tokenizer: Tokenizer, text: TokenFile, run: Path) -> tuple[Decoder, float]:
    model = build(config.model)
    model.tokenizer_fingerprint = tokenizer.fingerprint
    seconds = _train(model, config, config.pretrain, text, run / "pretrain", "pretraining")
    with atomic_folder(run / "base") as folder:
        save_model(model, folder)
        tokenizer.save(folder)
    return load_model(run / "base"), seconds  # the file, and in main memory, wherever it was trained


def _train(model: Decoder, config: DemoConfig, train: TrainConfig, text: TokenFile, folder: Path, label: str) -> float:
    """Train, and return the seconds that it took."""
    loader = PackedLoader(text, config.batch_size, config.length, config.seed, random_offset=True)
    trainer = Trainer(model, causal_lm_loss, loader, train, folder, [ProgressBar(f"   {label}")])
    started = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - started


def _losses(model: Decoder, run: Path, config: DemoConfig) -> dict[str, float]:
    """Held-out loss in nats per token, by domain."""
    files = {name: TokenFile.open(run / "data" / f"{name}-held-out") for name in DOMAINS}
    return {
        name: language_model_loss(model, sequential_batches(file, config.batch_size, config.length))["loss"]
        for name, file in files.items()
    }


def _in_a_new_process(function: Callable[..., Tuned], *arguments: Any) -> Tuned:
    """Call it in a fresh process: its peak memory is then its own, not that of what ran before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _tune(config: DemoConfig, run: Path, name: str) -> Tuned:
    method, train = config.methods()[name]
    folder = run / name.replace(" ", "-")
    model = load_model(run / "base")
    parameters = sum(p.numel() for p in model.parameters())
    torch.manual_seed(config.seed)  # a new process starts with another state; A of each LoRA is drawn from it
    report = tune(model, method)
    before = peak_memory(torch.device("cpu"))
    text = TokenFile.open(run / "data" / "source-training")
    seconds = _train(model, config, train, text, folder, name)
    peak = peak_memory(torch.device("cpu"))
    save_adapter(model, folder / "adapter", base="../../base")
    weight = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    return Tuned(name, report.trainable, parameters, _losses(model, run, config), seconds, peak, before, weight)


def _reload_and_merge(run: Path) -> tuple[Decoder, float]:
    """The LoRA loaded into a fresh base and merged, and the largest difference that merging makes to a logit."""
    model = load_model(run / "base")
    load_adapter(model, run / "LoRA" / "adapter")
    text = TokenFile.open(run / "data" / "source-held-out")
    tokens = next(sequential_batches(text, 8, 64))["tokens"]
    with torch.no_grad():
        unmerged = model.eval()(tokens)
        merge(model)
        return model, (model(tokens) - unmerged).abs().max().item()


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
