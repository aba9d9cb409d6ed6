"""FewGLUE: SuperGLUE's English tasks with 32 records to learn from and 32 to choose by, and the whole val as test.

Records: BoolQ 3,270, CB 56, COPA 100, MultiRC 83 passages, RTE 277, WSC 104, WiC 638 in test. WSC's train is all
true. The thirty-two are Schick and Schütze's (2021), the second thirty-two those of P-tuning (Liu et al. 2021).
"""

from pathlib import Path

from minillm.data.tasks.published import superglue
from minillm.data.tasks.published.files import Files
from minillm.data.tasks.published.multirc import multirc as multirc_form
from minillm.data.tasks.published.source import Source
from minillm.data.tasks.task import SPLITS, Task

FEWGLUE = Source(
    "fewglue",
    "github.com/THUDM/P-tuning, FewGLUE_32dev",
    "f4225d4d",
    "Schick and Schütze 2021, It's Not Just Size That Matters: Small Language Models Are Also Few-Shot Learners",
    "not stated",
)
FORMS = {
    "BoolQ": superglue.BOOLQ,
    "CB": superglue.CB,
    "COPA": superglue.copa({"cause": "What was the cause?", "effect": "What happened as a result?"}),
    "MultiRC": multirc_form(),
    "RTE": superglue.RTE,
    "WSC": superglue.WSC,
    "WiC": superglue.WIC,
}


def boolq(folder: str | Path | None = None) -> Task:
    """Is the answer to a question yes, says the paragraph? Learned from 32."""
    return _task("BoolQ", folder, boolq.__doc__)


def cb(folder: str | Path | None = None) -> Task:
    """Does an embedded clause follow from the text around it, contradict it, or neither? Learned from 32."""
    return _task("CB", folder, cb.__doc__)


def copa(folder: str | Path | None = None) -> Task:
    """Which of two sentences is the cause, or the effect, of another? Learned from 32."""
    return _task("COPA", folder, copa.__doc__)


def multirc(folder: str | Path | None = None) -> Task:
    """Is this one of the right answers to a question on a passage? Learned from 32 questions."""
    return _task("MultiRC", folder, multirc.__doc__)


def rte(folder: str | Path | None = None) -> Task:
    """Does the second text follow from the first? Learned from 32."""
    return _task("RTE", folder, rte.__doc__)


def wsc(folder: str | Path | None = None) -> Task:
    """Does the pronoun between asterisks stand for this noun? Learned from 32."""
    return _task("WSC", folder, wsc.__doc__)


def wic(folder: str | Path | None = None) -> Task:
    """Does the word between asterisks mean the same in both sentences? Learned from 32."""
    return _task("WiC", folder, wic.__doc__)


def _task(task: str, folder: str | Path | None, description: str) -> Task:
    form = FORMS[task]
    with Files(FEWGLUE, folder, [f"{task}/{name}.jsonl" for name in ("train", "dev32", "val")]) as files:
        splits = {
            split: [record for _, record in superglue.read(files, name, form)]
            for split, name in zip(SPLITS, files.names, strict=True)
        }
    return FEWGLUE.task(f"few_{task.lower()}", form.kind, splits, form.metrics, form.labels, description=description)
