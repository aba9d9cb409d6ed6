"""Words and their tags: parts of speech (Universal Dependencies), named entities (UD Slovene, WNUT17)."""

from collections.abc import Callable
from pathlib import Path

from minillm.data.tasks.published.cut import cut
from minillm.data.tasks.published.files import Files, Flaw, Row, number_of
from minillm.data.tasks.published.source import Source
from minillm.data.tasks.task import SPLITS, Tagged, Task

EWT = Source(
    "ud_en_ewt",
    "github.com/UniversalDependencies/UD_English-EWT",
    "15d613d8",
    "Silveira et al. 2014, A Gold Standard Dependency Corpus for English",
    "CC BY-SA 4.0",
)
SSJ = Source(
    "ud_sl_ssj",
    "github.com/UniversalDependencies/UD_Slovenian-SSJ",
    "17011b12",
    "Dobrovoljc, Erjavec and Krek 2017, The Universal Dependencies Treebank for Slovenian",
    "CC BY-SA 4.0",
)
WNUT = Source(
    "wnut17",
    "github.com/leondz/emerging_entities_17",
    "e52a2d2a",
    "Derczynski et al. 2017, Results of the WNUT2017 Shared Task on Novel and Emerging Entity Recognition",
    "CC BY 4.0",
)
UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)  # fmt: skip


def _bio(*kinds: str) -> tuple[str, ...]:
    return ("O", *(f"{side}-{kind}" for kind in kinds for side in "BI"))


SSJ_ENTITIES = _bio("deriv-per", "loc", "misc", "org", "per")
WNUT_ENTITIES = _bio("corporation", "creative-work", "group", "location", "person", "product")


def ud_en_pos(folder: str | Path | None = None) -> Task:
    """What part of speech is each word of an English sentence? 12,544 / 2,001 / 2,077 sentences, 17 tags.

    162 sentences of dev and test are also in train, such as "Thanks.".
    """
    names = [f"en_ewt-ud-{split}.conllu" for split in ("train", "dev", "test")]
    with Files(EWT, folder, names) as files:
        read = [[tagged for _, tagged in _conllu(files, name, _part_of_speech)] for name in names]
    splits = dict(zip(SPLITS, read, strict=True))
    return EWT.task("ud_en_pos", "tagging", splits, ("accuracy",), UPOS, description=ud_en_pos.__doc__, overlap=162)


def ud_sl_pos(folder: str | Path | None = None) -> Task:
    """What part of speech is each word of a Slovene sentence? 17 tags; 1,250 and 1,282 sentences of dev and test.

    Where there is no sl_ssj-ud-train.conllu, dev is cut by its documents: a tenth is valid, the rest train.
    """
    return _ssj("ud_sl_pos", folder, _part_of_speech, UPOS, "accuracy", ud_sl_pos.__doc__)


def ud_sl_ner(folder: str | Path | None = None) -> Task:
    """Which words of a Slovene sentence name a person, a place, an organisation or another thing? Tags BIO.

    The tags stand in the last column as NER=B-per. Names are few: 376 in dev, 187 in test. Splits as in `ud_sl_pos`.
    """
    return _ssj("ud_sl_ner", folder, _entity, SSJ_ENTITIES, "span_f1", ud_sl_ner.__doc__)


def wnut17(folder: str | Path | None = None) -> Task:
    """Which words of a post name something new? 3,394 / 1,009 / 1,287 posts, 6 kinds of entities, tags BIO.

    `word<TAB>tag`, an empty line between posts. Test is emerging.test.annotated: emerging.test.conll has words with two
    tags, of several annotators.
    """
    names = ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated")
    with Files(WNUT, folder, names) as files:
        splits = {split: _posts(files, name) for split, name in zip(SPLITS, names, strict=True)}
    description = wnut17.__doc__
    return WNUT.task("wnut17", "tagging", splits, ("span_f1",), WNUT_ENTITIES, description=description)


def _ssj(
    name: str,
    folder: str | Path | None,
    tag: Callable[[list[str]], int],
    labels: tuple[str, ...],
    metric: str,
    description: str,
) -> Task:
    train, *names = [f"sl_ssj-ud-{split}.conllu" for split in ("train", "dev", "test")]
    with Files(SSJ, folder, names) as files:
        dev, test = (_conllu(files, file, tag) for file in names)
        learn = _conllu(files, train, tag) if files.has(train) else []
    overlap = None if learn else 0
    if not learn:
        learn, dev = cut(dev, 0.1, key=lambda named: named[0])
    splits = {split: [tagged for _, tagged in read] for split, read in zip(SPLITS, (learn, dev, test), strict=True)}
    return SSJ.task(name, "tagging", splits, (metric,), labels, description=description, overlap=overlap)


def _blocks(files: Files, name: str) -> list[list[Row]]:
    """The lines between empty lines; WNUT17's train also has lines of a lone tab for empty ones."""
    blocks: list[list[Row]] = [[]]
    for number, line in enumerate(files.text(name).split("\n"), start=1):
        if line.strip():
            blocks[-1].append(Row(name, number, line.removesuffix("\r")))
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def _posts(files: Files, name: str) -> list[Tagged]:
    def cells(line: str) -> tuple[str, int]:
        parts = line.split("\t")
        if len(parts) != 2 or not parts[0].strip():
            raise Flaw(f"{line!r}: expected a word, a tab and a tag")
        return parts[0], number_of(parts[1].strip(), WNUT_ENTITIES)

    posts = [files.records(block, cells) for block in _blocks(files, name)]
    return [Tagged(*zip(*post, strict=True)) for post in posts if post]


def _conllu(files: Files, name: str, tag: Callable[[list[str]], int]) -> list[tuple[str, Tagged]]:
    """(document, sentence) in CoNLL-U: ten columns; not the ranges of contractions (1-2) nor empty nodes (8.1)."""

    def cells(line: str) -> tuple[str, int] | None:
        parts = line.split("\t")
        if len(parts) != 10:
            raise Flaw(f"{len(parts)} cells, not the 10 of CoNLL-U")
        return (parts[1], tag(parts)) if parts[0].isdecimal() else None

    found, document = [], ""
    for block in _blocks(files, name):
        for row in block:
            if row.value.startswith("# newdoc"):
                document = row.value
        words = files.records([row for row in block if not row.value.startswith("#")], cells)
        if words := [word for word in words if word]:
            found.append((document, Tagged(*zip(*words, strict=True))))
    return found


def _part_of_speech(cells: list[str]) -> int:
    return number_of(cells[3], UPOS)


def _entity(cells: list[str]) -> int:
    named = [field.removeprefix("NER=") for field in cells[9].split("|") if field.startswith("NER=")]
    if not named:
        raise Flaw(f"the last column {cells[9]!r} has no NER=")
    return number_of(named[0], SSJ_ENTITIES)
