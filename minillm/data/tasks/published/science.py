"""Sentences of papers: relations (ChemProt, SciERC) and the purpose of citations (ACL-ARC, SciCite).

As in Beltagy et al. 2019, SciBERT, and Gururangan et al. 2020, Don't Stop Pretraining: one JSON object a line, with
`text` and `label`. The metrics are theirs: micro-F1 for ChemProt, which with one label a record is the accuracy, and
macro-F1 for the others.
"""

from pathlib import Path

from minillm.data.tasks.published.files import Files, member, number_of
from minillm.data.tasks.published.source import Source
from minillm.data.tasks.task import SPLITS, Task, Text

SCIBERT = Source(
    "scibert_cls",
    "github.com/allenai/scibert, data/text_classification",
    "06793f77",
    "Beltagy, Lo and Cohan 2019, SciBERT: A Pretrained Language Model for Scientific Text",
    "Apache-2.0 for the repository; that of the data is not stated",
)
CHEMPROT = (
    "ACTIVATOR", "AGONIST", "AGONIST-ACTIVATOR", "AGONIST-INHIBITOR", "ANTAGONIST", "DOWNREGULATOR",
    "INDIRECT-DOWNREGULATOR", "INDIRECT-UPREGULATOR", "INHIBITOR", "PRODUCT-OF", "SUBSTRATE", "SUBSTRATE_PRODUCT-OF",
    "UPREGULATOR",
)  # fmt: skip
ACL_ARC = ("Background", "CompareOrContrast", "Extends", "Future", "Motivation", "Uses")
SCICITE = ("background", "method", "result")
SCIERC = ("COMPARE", "CONJUNCTION", "EVALUATE-FOR", "FEATURE-OF", "HYPONYM-OF", "PART-OF", "USED-FOR")
OVERLAP = {"chemprot": 4, "acl_arc": 95}  # of valid and test in train, counted at `commit`; the others were not


def chemprot(folder: str | Path | None = None) -> Task:
    """How does the chemical in << >> act on the protein in [[ ]]? 4,169 / 2,427 / 3,469 sentences, 13 relations.

    Kringelum et al. 2016. The sentences of a paper repeat with other pairs marked.
    """
    return _task("chemprot", "chemprot", folder, CHEMPROT, ("accuracy", "macro_f1"), chemprot.__doc__)


def acl_arc(folder: str | Path | None = None) -> Task:
    """Why does a paper on language technology cite another? 1,688 / 114 / 139 sentences, 6 purposes.

    Jurgens et al. 2018, Measuring the Evolution of a Scientific Field through Citation Frames. A sentence that cites
    several papers comes several times, and 43 of valid and 52 of test stand in train too: memory counts for much.
    """
    return _task("acl_arc", "citation_intent", folder, ACL_ARC, ("macro_f1", "accuracy"), acl_arc.__doc__)


def scicite(folder: str | Path | None = None) -> Task:
    """Why does a paper cite another: for background, a method or a result? 7,320 / 916 / 1,861 sentences.

    Cohan et al. 2019, Structural Scaffolds for Citation Intent Classification in Scientific Publications.
    """
    return _task("scicite", "sci-cite", folder, SCICITE, ("macro_f1", "accuracy"), scicite.__doc__)


def scierc(folder: str | Path | None = None) -> Task:
    """What is the relation of two terms in an abstract? 3,219 / 455 / 974 sentences, 7 relations.

    Luan et al. 2018, Multi-Task Identification of Entities, Relations, and Coreference.
    """
    name = "sciie-relation-extraction"
    return _task("scierc", name, folder, SCIERC, ("macro_f1", "accuracy"), scierc.__doc__)


def _task(
    name: str,
    place: str,
    folder: str | Path | None,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    description: str,
) -> Task:
    with Files(SCIBERT, folder, [f"{place}/{split}.txt" for split in ("train", "dev", "test")]) as files:
        splits = {
            split: files.records(
                files.objects(file),
                lambda row: Text(member(row, "text"), number_of(member(row, "label"), labels)),
            )
            for split, file in zip(SPLITS, files.names, strict=True)
        }
    overlap = OVERLAP.get(name)
    return SCIBERT.task(name, "classification", splits, metrics, labels, description=description, overlap=overlap)
