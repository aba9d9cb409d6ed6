"""Single sentences: film reviews (SST-2, MR), subjectivity (Subj), SMS spam."""

from pathlib import Path

from minillm.data.tasks.published.cut import FOLDS, cut, folds
from minillm.data.tasks.published.files import Files, member, number_of
from minillm.data.tasks.published.source import Source, one_of, variant
from minillm.data.tasks.task import SPLITS, Task, Text

SST2 = Source(
    "sst2",
    "github.com/clairett/pytorch-sentiment-classification, data/SST2",
    "457ffd83",
    "Socher et al. 2013, Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank",
    "not stated",
)
MR = Source(
    "mr",
    "github.com/nltk/nltk_data, packages/corpora/sentence_polarity.zip",
    "5db857e6",
    "Pang and Lee 2005, Seeing Stars: Exploiting Class Relationships for Sentiment Categorization",
    "CC BY 4.0 (as packaged by NLTK)",
)
SUBJ = Source(
    "subj",
    "github.com/nltk/nltk_data, packages/corpora/subjectivity.zip",
    "5db857e6",
    "Pang and Lee 2004, A Sentimental Education: Sentiment Analysis Using Subjectivity Summarization",
    "CC BY 4.0 (as packaged by NLTK)",
)
SMS_SPAM = Source(
    "sms_spam",
    "github.com/justmarkham/pycon-2016-tutorial, data/sms.tsv",
    "5339710562cc46c4a32a369d63f1e8751a18a54e",
    "Almeida, Hidalgo and Yamakami 2011, Contributions to the Study of SMS Spam Filtering",
    "free for all purposes, say its authors",
)


def sst2(folder: str | Path | None = None) -> Task:
    """Is a sentence of a film review positive? 6,920 / 872 / 1,821 whole sentences, not GLUE's 67,000 phrases.

    `text<TAB>label` without a header, 1 positive, 0 negative; lower case, hyphens removed; the test labels are real.
    """
    with Files(SST2, folder, ("train.tsv", "dev.tsv", "test.tsv")) as files:
        splits = {
            split: files.records(files.table(name, ("text", "label")), lambda row: _text(row, ("0", "1")))
            for split, name in zip(SPLITS, files.names, strict=True)
        }
    return SST2.task(
        "sst2", "classification", splits, ("accuracy",), ("negative", "positive"), description=sst2.__doc__, overlap=2
    )


def mr(folder: str | Path | None = None, *, fold: int = 0) -> Task:
    """Is a sentence of a film review positive? 5,331 positive and 5,331 negative ones, judged in ten folds.

    One sentence a line, a file for each class. No split is published, so `folds` says which line is in which.
    """
    return _two_files(MR, folder, fold, ("rt-polarity.neg", "rt-polarity.pos"), ("negative", "positive"), mr.__doc__)


def subj(folder: str | Path | None = None, *, fold: int = 0) -> Task:
    """Does a sentence tell the plot of a film (objective), or what a critic thinks of it? 5,000 of each; ten folds."""
    names = ("plot.tok.gt9.5000", "quote.tok.gt9.5000")
    return _two_files(SUBJ, folder, fold, names, ("objective", "subjective"), subj.__doc__)


def sms_spam(folder: str | Path | None = None) -> Task:
    """Is a text message spam? 5,574 messages (4,827 ham, 747 spam), 5,160 of them different.

    `label<TAB>text` without a header; quotes mean nothing. A message that comes twice is kept once, and only then a
    tenth of each class is cut for valid and a tenth for test. The authors rank systems by the Matthews correlation.
    """
    with Files(SMS_SPAM, folder, ("sms.tsv",)) as files:
        records = files.records(files.table("sms.tsv", ("label", "text")), lambda row: _text(row, ("ham", "spam")))
    unique = list(dict.fromkeys(records))
    rest, test = cut(unique, 0.1, key=lambda r: r.text, stratum=lambda r: r.label)
    train, valid = cut(rest, len(test) / max(1, len(rest)), key=lambda r: r.text, stratum=lambda r: r.label)
    splits = {"train": train, "valid": valid, "test": test}
    metrics = ("matthews", "f1", "accuracy")
    return SMS_SPAM.task("sms_spam", "classification", splits, metrics, ("ham", "spam"), description=sms_spam.__doc__)


def _text(row: dict, labels: tuple[str, ...]) -> Text:
    return Text(member(row, "text").strip(), number_of(row["label"].strip(), labels))


def _two_files(
    source: Source,
    folder: str | Path | None,
    fold: int,
    names: tuple[str, str],
    labels: tuple[str, str],
    description: str,
) -> Task:
    one_of("fold", fold, range(FOLDS))
    with Files(source, folder, names) as files:
        classes = [
            files.records(files.lines(name), lambda line, label=label: Text(line.strip(), label))
            for label, name in enumerate(names)
        ]
    name = variant(source.name, default=0, chosen=fold)
    return source.task(name, "classification", folds(classes, fold), ("accuracy",), labels, description=description)
