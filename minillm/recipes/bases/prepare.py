"""`minillm bases prepare`: what all bases of a language share, made once: training text, held-out text, tokenizer."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.data import Document, corpus_summary
from minillm.evaluation.baselines import compressed_bits_per_byte
from minillm.files import atomic_folder, atomic_write, write_json
from minillm.recipes.bases.corpora import LANGUAGES, Work, read_books
from minillm.recipes.common import say
from minillm.recipes.locate import quote
from minillm.recipes.objective import MASK, SENTINELS
from minillm.tokenizers import SentencePieceTokenizer

VOCAB_SIZE = 8192
REPEAT = 80  # characters: a shorter paragraph may stand in two works by chance


@dataclass(frozen=True)
class PrepareConfig:
    """`minillm bases prepare`."""

    language: Literal["english", "slovene"] = "english"
    data: str = ""  # the folder that holds those of the corpora
    out: str = ""  # the folder to write


def prepare(config: PrepareConfig) -> Path:
    """Write train.jsonl, held_out.jsonl, manifest.json and a tokenizer to the folder `config.out`; returns it.

    `config.data` holds the corpora's folders, those named in `corpora.LANGUAGES`. What stands in the held-out works is
    taken out of the training text, paragraph by paragraph. The tokenizer learns from the training text alone.
    """
    readers, root, out = LANGUAGES[config.language], Path(config.data), config.out
    wrong = [f"{name}=: which folder?" for name in ("data", "out") if not getattr(config, name)]
    if missing := [name for name in readers if not (root / name).is_dir()]:
        wrong.append(
            f"data={config.data} lacks {', '.join(missing)}: {config.language} is made of {', '.join(readers)}"
        )
    if wrong:
        raise ValueError("the text cannot be prepared: " + "; ".join(wrong))
    held_out = list(read_books(root / next(iter(readers)), held_out=True))
    works, dropped = without((work for name, reader in readers.items() for work in reader(root / name)), held_out)
    training = [Document(work.title, work.text) for work in works]
    tokenizer = SentencePieceTokenizer.train(
        [document.text for document in training], VOCAB_SIZE, special_symbols=(MASK, *SENTINELS)
    )
    manifest = {"language": config.language, "paragraphs_dropped_as_held_out": dropped}
    manifest["compressed_bits_per_byte"] = compressors(works, held_out)
    with atomic_folder(out) as folder:
        for name, side in (("train", works), ("held_out", held_out)):
            documents = [Document(work.title, work.text) for work in side]
            write_works(folder / f"{name}.jsonl", side)
            manifest[name] = corpus_summary(documents) | {"works": [work.record() for work in side]}
        write_json(folder / "manifest.json", manifest)
        tokenizer.save(folder)
    for name in ("train", "held_out"):
        say(f"{name}: {manifest[name]['documents']} works, {manifest[name]['bytes']:,} bytes")
    say(f"{dropped} paragraphs of the held-out works were taken out of the training text; {tokenizer}")
    files = f"data.train={quote(Path(out) / 'train.jsonl')} data.held_out={quote(Path(out) / 'held_out.jsonl')}"
    say(f"Train on it: minillm pretrain --preset NAME {files} tokenizer.folder={quote(out)} run=FOLDER")
    return Path(out)


def compressors(works: Sequence[Work], held_out: Sequence[Work]) -> dict[str, float]:
    """What compressors need for a byte of the held-out works: alone, and xz also after the training text."""
    known, text = ("\n".join(work.text for work in side).encode() for side in (works, held_out))
    found = {how: compressed_bits_per_byte(text, how) for how in ("gzip", "xz")}
    return found | {"xz_after_the_training_text": compressed_bits_per_byte(text, "xz", known)}


def without(works: Iterable[Work], held_out: Sequence[Work]) -> tuple[list[Work], int]:
    """The works without the longer paragraphs that stand in `held_out` too, and how many those were."""
    seen = {_key(paragraph) for work in held_out for paragraph in work.text.split("\n") if len(paragraph) >= REPEAT}
    kept, dropped = [], 0
    for work in works:
        paragraphs = work.text.split("\n")
        fresh = [paragraph for paragraph in paragraphs if _key(paragraph) not in seen]
        dropped += len(paragraphs) - len(fresh)
        if fresh:
            kept.append(Work(work.title, work.source, work.licence, "\n".join(fresh)))
    return kept, dropped


def _key(paragraph: str) -> str:
    """The letters of a paragraph: other quotes, spaces and capitals do not make it new."""
    return "".join(c for c in paragraph.lower() if c.isalnum())


def write_works(path: Path, works: Sequence[Work]) -> None:
    """One JSON object a line, as `read_documents` reads them."""
    lines: list[dict[str, Any]] = [{"title": work.title, "text": work.text} for work in works]
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
