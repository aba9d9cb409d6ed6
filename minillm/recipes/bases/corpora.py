"""The texts that the bases in the box learned from: folders of openly licensed corpora, read as works.

Each corpus is read as its files are: their encodings, tags, hard line ends and the publisher's notices are undone here,
so that a work is plain text with one paragraph on a line.
"""

import csv
import gzip
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PUBLIC_DOMAIN = "public domain"


@dataclass(frozen=True)
class Work:
    """A text with where it comes from and on which terms."""

    title: str
    source: str
    licence: str
    text: str

    def record(self) -> dict[str, Any]:
        """All about the work but its text, of which the hash and the UTF-8 size are told."""
        data = self.text.encode()
        described = {"title": self.title, "source": self.source, "licence": self.licence}
        return described | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def read_books(folder: Path, held_out: bool = False) -> Iterator[Work]:
    """The works of train.txt.gz, or of valid.txt, with what SOURCES.tsv says of each.

    A work is a run of lines without a blank one. The table has another order, but the size of every work: each is
    found by it.
    """
    split, name = ("valid", "valid.txt") if held_out else ("train", "train.txt.gz")
    with open(folder / "SOURCES.tsv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["split"] == split]
    by_size = {int(row["bytes"]): row for row in rows}
    data = (folder / name).read_bytes()
    works = [
        text.strip("\n") for text in (gzip.decompress(data) if name.endswith(".gz") else data).decode().split("\n\n")
    ]
    sizes = [len(text.encode()) + 2 for text in works]  # the table counts the line ends after a work
    if sorted(sizes) != sorted(int(row["bytes"]) for row in rows) or len(by_size) < len(rows):
        raise ValueError(
            f"{folder / name} has {len(works)} works, whose sizes are not those of the {len(rows)} rows "
            f"for {split} in SOURCES.tsv: get both files again, they do not belong together"
        )
    for size, text in zip(sizes, works, strict=True):
        row = by_size[size]
        source = f"{row['repo']}@{row['commit'][:8]} {row['path']}"
        yield Work(f"{row['title']} ({row['author']})", source, row["licence"], text)


def read_addresses(folder: Path) -> Iterator[Work]:
    """Speeches, a file each: UTF-8, or Windows-1252 in which some quotes and dashes went through Chinese Big5."""
    for file in sorted(folder.glob("*.txt")):
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            text = file.read_bytes().decode("cp1252")
            text = re.sub("¡.", lambda pair: pair[0].encode("cp1252").decode("big5"), text)
        yield Work(
            f"{folder.name} {file.stem}",
            f"nltk_data {folder.name.removeprefix('nltk_')}.zip {file.name}",
            PUBLIC_DOMAIN,
            tidy(text),
        )


def read_masc(folder: Path) -> Iterator[Work]:
    """The Manually Annotated Sub-Corpus of the ANC: word_TAG, of which the words are put together again.

    Its e-mails are left out: they hold the names and addresses of living people.
    """
    genres = dict(line.split() for line in (folder / "categories.txt").read_text(encoding="utf-8").splitlines())
    for file in sorted(folder.glob("*/*.txt")):
        name = file.relative_to(folder).as_posix()
        if genres.get(name) in ("email", "spam"):
            continue
        lines = file.read_bytes().decode("utf-8").splitlines()
        text = "\n".join(untagged(line) for line in lines)
        yield Work(
            f"MASC {name}",
            f"nltk_data masc_tagged.zip {name}",
            "MASC: free for research and development, including commercial",
            tidy(text),
        )


def read_shakespeare(folder: Path) -> Iterator[Work]:
    """Plays in verse: a line ends where a verse does."""
    yield Work(
        "Plays (William Shakespeare)",
        "karpathy/char-rnn@6f9487a6 data/tinyshakespeare/input.txt",
        PUBLIC_DOMAIN,
        tidy((folder / "input.txt").read_bytes().decode("ascii")),
    )


def read_botchan(folder: Path) -> Iterator[Work]:
    """A novel between the publisher's notices, with lines of at most 72 characters and no blank ones."""
    text = (folder / "botchan.txt").read_bytes().decode("utf-8-sig")
    found = re.search(r"\*\*\* START OF [^\n]*\*\*\*\n(.*)\n\*\*\* END OF ", text.replace("\r\n", "\n"), re.DOTALL)
    if not found:
        raise ValueError(f"{folder / 'botchan.txt'} lacks Project Gutenberg's lines *** START OF and *** END OF")
    text = "\n".join(line for line in found[1].split("\n") if "Project Gutenberg" not in line)
    text = re.sub(r"(?m)^(?:Produced by|End of|\[[A-Z]+:)[^\n]*$", "", text)  # the transcribers' names and notes
    yield Work(
        "Botchan (Natsume Soseki, translated by Yasotaro Morri)",
        "google/sentencepiece@27344904 data/botchan.txt",
        "public domain in the United States",
        tidy(unwrapped(text)),
    )


TYPEWRITER = str.maketrans({
    "‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "\xad": None, "\0": None,
})  # fmt: skip


def tidy(text: str) -> str:
    """Lines without spaces at their ends and without blank ones in between; quotes and dashes as on a typewriter."""
    lines = (" ".join(line.split()) for line in text.translate(TYPEWRITER).splitlines())
    return "\n".join(line for line in lines if line)


def unwrapped(text: str, width: int = 60) -> str:
    """Paragraphs of hard-wrapped lines as one line each; a line shorter than `width` ends its paragraph."""
    return re.sub(rf"(?m)(?<=^)([^\n]{{{width},}})\n(?=[^\n])", r"\1 ", text)


OPENING, CLOSING = "([{$#", (".", ",", ":", ";", "?", "!", "%", ")", "]", "}", "...")
CLITICS = ("'s", "'re", "'ve", "'ll", "'d", "'m", "n't", "'S", "N'T", "'")


def untagged(line: str) -> str:
    """The sentence whose words, each with a tag of the Penn Treebank, `line` lists.

    Punctuation and clitics (do n't) go back to the word before them. Quotes open and close by turns.
    """
    words = [token.rpartition("_")[0] for token in line.split()]
    text, glued, inside = "", True, False
    for word in filter(None, words):
        word = word.translate(TYPEWRITER)
        quote = word in ('"', "``", "''")
        closes = word in CLOSING or word in CLITICS or (quote and inside)
        text += ("" if glued or closes else " ") + ('"' if quote else word)
        glued = word in OPENING or (quote and not inside)
        inside ^= quote
    return text


Reader = Callable[[Path], Iterator[Work]]
ENGLISH: dict[str, Reader] = {
    "books_en": read_books,
    "nltk_state_union": read_addresses,
    "nltk_inaugural": read_addresses,
    "nltk_masc_tagged": read_masc,
    "tinyshakespeare": read_shakespeare,
    "botchan": read_botchan,
}
SLOVENE: dict[str, Reader] = {"books_sl": read_books}
LANGUAGES = {"english": ENGLISH, "slovene": SLOVENE}  # the first folder of each holds the held-out works as well
