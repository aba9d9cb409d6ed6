"""Pairs of sentences: does one follow from the other (RTE, SI-NLI), and how near are they (STS-B)."""

import math
from pathlib import Path

from minillm.data.tasks.published.cut import cut
from minillm.data.tasks.published.files import Files, Flaw, member, number_of
from minillm.data.tasks.published.source import Source, one_of, variant
from minillm.data.tasks.task import SPLITS, Record, Task, Text
from minillm.ops import IGNORE

RTE = Source(
    "rte",
    "github.com/marcwww/nlu_eval, data/RTE",
    "ccd55c37de74ebd86c70ae58f67dceb0aa444f43",
    "Wang et al. 2019, GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding",
    "not stated",
)
STSB = Source(
    "stsb",
    "github.com/PhilipMay/stsb-multi-mt, data",
    "30de0dec4ee199b7f42351d3f1a0b19592955385",
    "Cer et al. 2017, SemEval-2017 Task 1: Semantic Textual Similarity (other languages: May 2021, by DeepL)",
    "CC BY-SA 4.0",
)
SI_NLI = Source(
    "si_nli",
    "github.com/SloLama/slobench_evaluation, data/SI-NLI",
    "2f4125ba",
    "Klemen, Žagar, Čibej and Robnik-Šikonja 2022, Slovene Natural Language Inference Dataset SI-NLI",
    "CC BY-NC-SA 4.0",
)
RTE_LABELS = ("entailment", "not_entailment")
NLI_LABELS = ("entailment", "neutral", "contradiction")
LANGUAGES = ("en", "de", "fr")


def rte(folder: str | Path | None = None) -> Task:
    """Does the second text follow from the first? 2,490 / 277 pairs, GLUE's train and dev.

    The labels of GLUE's test are secret, so dev is test here, as in the papers that report it, and valid is a tenth of
    train, cut by first texts. `rte_unlabelled` has the 3,000 test pairs for a submission.
    """
    with Files(RTE, folder, ("train.tsv", "dev.tsv")) as files:
        train, test = (_pairs(files, name, "sentence1", "sentence2", RTE_LABELS) for name in files.names)
    return RTE.task("rte", "classification", _cut(train, test), ("accuracy",), RTE_LABELS, description=rte.__doc__)


def rte_unlabelled(folder: str | Path | None = None) -> list[tuple[str, Record]]:
    """GLUE's 3,000 test pairs, numbered from 0 as in the column `index`."""
    with Files(RTE, folder, ("test.tsv",)) as files:
        return _numbered(_pairs(files, "test.tsv", "sentence1", "sentence2"))


def si_nli(folder: str | Path | None = None) -> Task:
    """Does a Slovene sentence follow from another, contradict it, or neither? 4,392 / 547 pairs.

    The labels of test are secret, so dev is test here, and valid is a tenth of train, cut by premises. Tab-separated,
    14 columns, quotes meaning nothing. `si_nli_unlabelled` has the 998 test pairs for a submission to SloBENCH.
    """
    with Files(SI_NLI, folder, ("train.tsv", "dev.tsv")) as files:
        train, test = (_pairs(files, name, "premise", "hypothesis", NLI_LABELS) for name in files.names)
    splits = _cut(train, test)
    return SI_NLI.task("si_nli", "classification", splits, ("accuracy",), NLI_LABELS, description=si_nli.__doc__)


def si_nli_unlabelled(folder: str | Path | None = None) -> list[tuple[str, Record]]:
    """The 998 test pairs of SI-NLI, numbered from 0 as they have no names."""
    with Files(SI_NLI, folder, ("test_without_labels.tsv",)) as files:
        return _numbered(_pairs(files, "test_without_labels.tsv", "premise", "hypothesis"))


def stsb(folder: str | Path | None = None, *, language: str = "en") -> Task:
    """How near in meaning are two sentences, from 0 to 5? 5,749 / 1,500 / 1,379 pairs, with the real test scores.

    Commas and quotes as spreadsheets write them, no header. German and French are machine translations of English,
    where train may be some pairs shorter: translation makes more of them equal to those of dev and test.
    """
    one_of("language", language, LANGUAGES)
    names = [f"stsb-{language}-{split}.csv" for split in ("train", "dev", "test")]
    with Files(STSB, folder, names) as files:
        splits = {
            split: files.records(files.table(name, ("first", "second", "score"), quoted=True), _scored)
            for split, name in zip(SPLITS, names, strict=True)
        }
    name, overlap = variant("stsb", default="en", chosen=language), 13 if language == "en" else None
    metrics = ("pearson", "spearman")
    return STSB.task(name, "regression", splits, metrics, description=stsb.__doc__, overlap=overlap)


def _pairs(files: Files, name: str, first: str, second: str, labels: tuple[str, ...] = ()) -> list[Text]:
    """Without `labels` the label of every record is IGNORE: nobody knows it."""

    def pair(row: dict) -> Text:
        label = number_of(member(row, "label").strip(), labels) if labels else IGNORE
        return Text(member(row, first), label, member(row, second))

    columns = (first, second, "label") if labels else (first, second)
    return files.records(files.table(name, columns, header=True), pair)


def _numbered(pairs: list[Text]) -> list[tuple[str, Record]]:
    return [(str(number), pair) for number, pair in enumerate(pairs)]


def _scored(row: dict) -> Text:
    try:
        score = float(row["score"])
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise Flaw(f"the score {row['score']!r} is no number from 0 to 5")
    return Text(member(row, "first"), score, member(row, "second"))


def _cut(train: list[Text], test: list[Text]) -> dict[str, list[Text]]:
    train, valid = cut(train, 0.1, key=lambda r: r.text, stratum=lambda r: r.label)
    return {"train": train, "valid": valid, "test": test}
