"""`minillm tokenizer`: learn a tokenizer from text, and look at what it makes of a text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minillm.config import to_dict
from minillm.data import Document
from minillm.files import atomic_folder, write_json
from minillm.recipes.common import CorpusConfig, find_run, format_table, read_corpus, say
from minillm.recipes.locate import find_tokenizer, quote
from minillm.tokenizers import ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from minillm.training import create_run_folder

VOCAB_SIZE = 4096


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer. Bytes have 259 ids and characters as many as there are different ones; neither has a size."""

    kind: Literal["bpe", "unigram", "bytes", "characters"] = "bpe"
    vocab_size: int | None = None  # of bpe and unigram, byte and special tokens included; none: 4096
    character_coverage: float = 0.9995  # of bpe and unigram: share of the characters with pieces, the rest is bytes
    special_symbols: tuple[str, ...] = ()  # further tokens that no text becomes; pretrain adds those it needs itself
    folder: str = ""  # use the tokenizer saved there (also that of a run or model) instead of making one

    def __post_init__(self):
        learned = {"vocab_size": None, "character_coverage": TokenizerConfig.character_coverage}
        unused = [name for name, default in learned.items() if getattr(self, name) != default]
        wrong = []
        asked = unused + ["kind"] * (self.kind != TokenizerConfig.kind)
        asked += ["special_symbols"] * bool(self.special_symbols)
        if self.folder and asked:
            wrong.append(f"folder={self.folder} uses a tokenizer as it is: leave {', '.join(asked)} out")
        elif unused and self.kind in ("bytes", "characters"):
            wrong.append(f"kind={self.kind} has no {' and no '.join(unused)}: leave it out, or choose bpe or unigram")
        if not 0 < self.character_coverage <= 1:
            wrong.append(f"character_coverage={self.character_coverage}: above 0 and at most 1")
        if wrong:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True)
class TokenizerRunConfig:
    """`minillm tokenizer train`: the same held-out documents as `minillm pretrain` splits off stay unseen."""

    run: str = ""  # the folder to write; when empty, runs/tokenizer-<date>-<time>
    data: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


def make_tokenizer(config: TokenizerConfig, documents: Sequence[Document], needed: Sequence[str] = ()) -> Tokenizer:
    """Load or learn the tokenizer that `config` asks for; ValueError if the documents do not support it.

    A new one gets the special tokens that `config` names and those `needed`; a saved one stays as it is.
    """
    if config.folder:
        return load_tokenizer(find_tokenizer(config.folder))
    texts = [document.full_text for document in documents]
    symbols = tuple(dict.fromkeys((*config.special_symbols, *needed)))
    try:
        if config.kind == "bytes":
            return ByteTokenizer(symbols)
        if config.kind == "characters":
            return CharTokenizer.train(texts, symbols)
        size = VOCAB_SIZE if config.vocab_size is None else config.vocab_size
        return SentencePieceTokenizer.train(
            texts, size, config.kind, special_symbols=symbols, character_coverage=config.character_coverage
        )
    except ValueError as error:
        raise ValueError(
            f"tokenizer.{error}" if str(error).startswith("vocab_size") else f"tokenizer: {error}"
        ) from None


def train_tokenizer(config: TokenizerRunConfig) -> Path:
    """Learn a tokenizer, save it in `run/tokenizer`, and measure it on held-out text in `run/report.json`."""
    run = find_run(config, "tokenizer", resume=False)
    training, held_out = read_corpus(config.data)
    tokenizer = make_tokenizer(config.tokenizer, training)
    with atomic_folder(run / "tokenizer") as folder:
        tokenizer.save(folder)
    create_run_folder(run, {"recipe": "tokenizer", "config": to_dict(config)})
    report = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    report |= {name: compression(tokenizer, side) for name, side in (("train", training), ("held_out", held_out))}
    write_json(run / "report.json", report)
    say(f"{tokenizer}")
    for name in ("train", "held_out"):
        say(f"{name}: {report[name]['bytes_per_token']:.2f} bytes per token")
    say(f"Saved in {run}. Look at it: minillm tokenizer show {quote(run)} TEXT; use it: tokenizer.folder={quote(run)}")
    return run


def compression(tokenizer: Tokenizer, documents: Sequence[Document]) -> dict[str, float]:
    """How many tokens the documents have, and how many of their UTF-8 bytes one token stands for on average."""
    tokens = sum(len(tokenizer.encode(document.full_text)) for document in documents)
    size = sum(len(document.full_text.encode()) for document in documents)
    return {"bytes": size, "tokens": tokens, "bytes_per_token": size / tokens}


def show_tokens(folder: str, text: str) -> str:
    """A table of the tokens that the tokenizer of a run, model or tokenizer folder makes of `text`."""
    tokenizer = load_tokenizer(find_tokenizer(folder))
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty: there is no token to show")
    rows = [(at, i, repr(tokenizer.id_to_piece(i))[1:-1], tokenizer.token_bytes(i)) for at, i in enumerate(ids)]
    table = format_table(("position", "id", "piece", "bytes"), rows)
    size = len(text.encode())
    counts = f"{len(ids)} tokens for {len(text)} characters, {size} bytes: {size / len(ids):.2f} bytes per token"
    return f"{tokenizer}\n\n{table}\n\n{counts}"
