"""Texts and what they become: translations (Multi30k, English-Slovene) and summaries (SciTLDR)."""

from pathlib import Path

from minillm.data.tasks.published.files import Files, Flaw, member
from minillm.data.tasks.published.source import Source, one_of, variant
from minillm.data.tasks.task import SPLITS, Rewrite, Task

MULTI30K = Source(
    "multi30k",
    "github.com/multi30k/dataset, data/task1/raw",
    "a3d2e0d2",
    "Elliott et al. 2016, Multi30K: Multilingual English-German Image Descriptions (French: Elliott et al. 2017)",
    "not stated",
)
EN_SL = Source(
    "derived_en_sl",
    "the English and the Slovene SuperGLUE (github.com/SloLama/slobench_evaluation), joined by their idx,",
    "2f4125ba",
    "Žagar and Robnik-Šikonja 2022, Slovene SuperGLUE Benchmark: Translation and Evaluation",
    "that of the sets it is made of",
)
SCITLDR = Source(
    "scitldr",
    "github.com/allenai/scitldr, SciTLDR-Data/SciTLDR-A",
    "5ccad9c0",
    "Cachola et al. 2020, TLDR: Extreme Summarization of Scientific Documents",
    "Apache-2.0",
)
LANGUAGES = ("en", "de", "fr")
TESTS = ("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")
OVERLAP = {"en": 1, "fr": 3}  # descriptions of valid that are also in train, counted at `commit`
DIRECTIONS = ("en-sl", "sl-en")


def multi30k(folder: str | Path | None = None, *, source: str = "en", target: str = "de", test: str = TESTS[0]) -> Task:
    """Translate the description of a photograph: 29,000 / 1,014 / 1,000 lines (461 in test_2017_mscoco)."""
    one_of("source", source, LANGUAGES)
    one_of("target", target, [language for language in LANGUAGES if language != source])
    parts = {"train": "train", "valid": "val", "test": one_of("test", test, TESTS)}
    with Files(MULTI30K, folder, [f"{p}.{side}" for p in parts.values() for side in (source, target)]) as files:
        splits = {split: _aligned(files, part, source, target) for split, part in parts.items()}
    name = variant("multi30k", default="en-de", chosen=f"{source}-{target}")
    name = variant(name, default=TESTS[0], chosen=test)
    overlap = OVERLAP.get(source) if test != "test_2017_mscoco" else None
    return MULTI30K.task(name, "rewriting", splits, ("bleu", "chrf"), description=multi30k.__doc__, overlap=overlap)


def _aligned(files: Files, part: str, source: str, target: str) -> list[Rewrite]:
    sides = [files.lines(f"{part}.{language}") for language in (source, target)]
    if len(sides[0]) != len(sides[1]) and all(sides):
        files.flaws.append(f"{part}: {len(sides[0])} lines of {source} and {len(sides[1])} of {target}")
    return [Rewrite(a.value.strip(), (b.value.strip(),)) for a, b in zip(*sides, strict=False)]


def en_sl(folder: str | Path | None = None, *, direction: str = "en-sl") -> Task:
    """Translate between English and Slovene: learned from a machine's translations, judged by people's.

    `english<TAB>slovene`. Train is Google's translation of RTE's train and of BoolQ's questions, valid that of RTE's
    val; test is what people made of RTE and CB. Sentences whose English stands in test are left out of the others, and
    those in valid out of train.
    """
    one_of("direction", direction, DIRECTIONS)
    parts = {
        "test": ("rte_human.tsv", "cb_human_val.tsv"),
        "valid": ("rte_mt.val.tsv",),
        "train": ("rte_mt.train.tsv", "boolq_questions_mt.tsv"),
    }
    pairs: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()  # from the most precious split down
    with Files(EN_SL, folder, [name for names in parts.values() for name in names]) as files:
        for split, names in parts.items():
            read = [pair for name in names for pair in files.records(files.table(name, ("english", "slovene")), _pair)]
            pairs[split] = [pair for pair in read if not seen & set(pair)]
            seen.update(text for pair in pairs[split] for text in pair)
    splits = {
        split: [Rewrite(*((en, (sl,)) if direction == "en-sl" else (sl, (en,)))) for en, sl in pairs[split]]
        for split in SPLITS
    }
    name = variant("en_sl", default="en-sl", chosen=direction)
    return EN_SL.task(name, "rewriting", splits, ("bleu", "chrf"), description=en_sl.__doc__)


def _pair(row: dict) -> tuple[str, str]:
    return member(row, "english").strip(), member(row, "slovene").strip()


def scitldr(folder: str | Path | None = None) -> Task:
    """Say in one sentence what the abstract of a paper says: 1,992 / 619 / 618 abstracts.

    One JSON object a line: `source` is a list of sentences, `target` a list of summaries, by authors and by
    reviewers: 1,992 / 1,453 / 1,967.
    """
    with Files(SCITLDR, folder, [f"{split}.jsonl" for split in ("train", "dev", "test")]) as files:
        splits = {
            split: files.records(files.objects(name), _summary) for split, name in zip(SPLITS, files.names, strict=True)
        }
    metrics = ("rouge_l", "rouge_1", "rouge_2")
    return SCITLDR.task("scitldr", "rewriting", splits, metrics, description=scitldr.__doc__, overlap=3)


def _summary(row: dict) -> Rewrite:
    """A sentence of an abstract may be empty (one is), a summary may not."""
    for name in ("source", "target"):
        texts = member(row, name, list)
        empty = not any(texts) if name == "source" else not texts or not all(texts)
        if empty or not all(isinstance(text, str) for text in texts):
            raise Flaw(f"{name!r} is {str(texts)[:60]}, expected a list of texts")
    source, target = ([text.strip() for text in row[name]] for name in ("source", "target"))
    return Rewrite(" ".join(filter(None, source)), tuple(target))
