"""Slovene SuperGLUE: the tasks of SuperGLUE in human and in machine translation.

translation="human" (HumanT): BoolQ 92 / 18, CB 250 / 56, COPA 400 / 100, MultiRC 15 / 3 passages, RTE 232 / 29, WSC
554 / 104. translation="machine" (GoogleMT): BoolQ 9,427 / 3,270, CB 250 / 56, COPA 400 / 100, MultiRC 456 / 83
passages, RTE 2,490 / 277; no WSC. The numbers are those of train and val: val is test here, and valid is a tenth of
train. The labels of SloBENCH's test are secret; the functions *_unlabelled read the test.jsonl of its archives
(github.com/clarinsi/slobench-eval-docker at 8ffb67d9), put beside train.jsonl, for a submission.
"""

from functools import partial
from pathlib import Path

from minillm.data.tasks.published import superglue
from minillm.data.tasks.published.files import Files
from minillm.data.tasks.published.multirc import multirc as multirc_form
from minillm.data.tasks.published.source import Source, one_of, variant
from minillm.data.tasks.task import Record, Task

SLO_SUPERGLUE = Source(
    "slo_superglue",
    "github.com/SloLama/slobench_evaluation, data/SuperGLUE-HumanT and data/SuperGLUE-GoogleMT",
    "2f4125ba",
    "Žagar and Robnik-Šikonja 2022, Slovene SuperGLUE Benchmark: Translation and Evaluation",
    "not stated",
)
FOLDERS = {"human": "HumanT", "machine": "GoogleMT"}
FORMS = {
    "BoolQ": superglue.BOOLQ,
    "CB": superglue.CB,
    "COPA": superglue.copa({"cause": "Kaj je bil vzrok?", "effect": "Kaj se je zgodilo zaradi tega?"}),
    "MultiRC": multirc_form(patchy=True),
    "RTE": superglue.RTE,
    "WSC": superglue.WSC,
}
OVERLAP = {"slo_boolq-machine": 28, "slo_copa": 1}  # records of test that are also in train, counted at `commit`


def boolq(folder: str | Path | None = None, *, translation: str = "human") -> Task:
    """Is the answer to a question yes, says the paragraph? Slovene."""
    return _task("BoolQ", folder, translation, boolq.__doc__)


def cb(folder: str | Path | None = None, *, translation: str = "human") -> Task:
    """Does an embedded clause follow from the text around it, contradict it, or neither? Slovene CommitmentBank."""
    return _task("CB", folder, translation, cb.__doc__)


def copa(folder: str | Path | None = None, *, translation: str = "human") -> Task:
    """Which of two sentences is the cause, or the effect, of another? Slovene."""
    return _task("COPA", folder, translation, copa.__doc__)


def multirc(folder: str | Path | None = None, *, translation: str = "human") -> Task:
    """Is this one of the right answers to a question on a passage? Slovene."""
    return _task("MultiRC", folder, translation, multirc.__doc__)


def rte(folder: str | Path | None = None, *, translation: str = "human") -> Task:
    """Does the second text follow from the first? Slovene."""
    return _task("RTE", folder, translation, rte.__doc__)


def wsc(folder: str | Path | None = None) -> Task:
    """Does the pronoun between asterisks stand for this noun? Slovene Winograd schemas, translated by people."""
    return _task("WSC", folder, "human", wsc.__doc__)


def _unlabelled(task: str, folder: str | Path | None = None) -> list[tuple[str, Record]]:
    """The records of SloBENCH's test, with their `idx`."""
    name = f"HumanT/{task}/test.jsonl"
    with Files(SLO_SUPERGLUE, folder, (name,)) as files:
        return superglue.read(files, name, FORMS[task], labelled=False)


boolq_unlabelled = partial(_unlabelled, "BoolQ")
cb_unlabelled = partial(_unlabelled, "CB")
copa_unlabelled = partial(_unlabelled, "COPA")
multirc_unlabelled = partial(_unlabelled, "MultiRC")
rte_unlabelled = partial(_unlabelled, "RTE")
wsc_unlabelled = partial(_unlabelled, "WSC")


def _task(task: str, folder: str | Path | None, translation: str, description: str) -> Task:
    form, place = FORMS[task], FOLDERS[one_of("translation", translation, tuple(FOLDERS))]
    rebuilt, train = f"{place}/{task}/train.rebuilt.jsonl", f"{place}/{task}/train.jsonl"
    with Files(SLO_SUPERGLUE, folder, (train, f"{place}/{task}/val.jsonl")) as files:
        # the machine-translated train of BoolQ is published as one text file a record, and joined by its users
        named = rebuilt if files.has(rebuilt) else train
        learn, judge = (
            superglue.read(files, name, form, unescape=translation == "machine") for name in (named, files.names[1])
        )
    name = variant(f"slo_{task.lower()}", default="human", chosen=translation)
    splits = superglue.splits(learn, judge, form)
    return SLO_SUPERGLUE.task(
        name, form.kind, splits, form.metrics, form.labels, description=description, overlap=OVERLAP.get(name, 0)
    )
