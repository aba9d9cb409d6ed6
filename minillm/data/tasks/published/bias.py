"""CrowS-Pairs: pairs of sentences that differ in whom they are about. Nothing is learned from them: no Task."""

from dataclasses import dataclass
from pathlib import Path

from minillm.data.tasks.published.files import Files, member, number_of
from minillm.data.tasks.published.source import Source

CROWS_PAIRS = Source(
    "crows_pairs",
    "github.com/nyu-mll/crows-pairs, data",
    "8aaac11c",
    "Nangia et al. 2020, CrowS-Pairs: A Challenge Dataset for Measuring Social Biases in Masked Language Models",
    "CC BY-SA 4.0",
)
FILES = ("crows_pairs_anonymized.csv", "data_crows_pairs_anonymized.csv")  # under either name
DIRECTIONS = ("stereo", "antistereo")
BIAS_TYPES = (
    "age", "disability", "gender", "nationality", "physical-appearance", "race-color", "religion", "sexual-orientation",
    "socioeconomic",
)  # fmt: skip


@dataclass(frozen=True)
class SentencePair:
    """Two sentences that differ in a few words, of which `more` is the more stereotyping one.

    direction: "stereo" if `more` shows a stereotype of a disadvantaged group, "antistereo" if `less` goes against one.
    """

    more: str
    less: str
    direction: str
    bias_type: str


def crows_pairs(folder: str | Path | None = None) -> tuple[SentencePair, ...]:
    """1,508 pairs: 1,290 stereo and 218 antistereo, of nine kinds of bias.

    A model is asked which sentence of a pair is likelier; without a bias it is `more` in half of them. The authors warn
    that the pairs were written by few people in the USA; Blodgett et al. 2021, Stereotyping Norwegian Salmon, found
    flaws in nearly all of them. Treat the number as a symptom, not as a proof of fairness.
    """
    with Files(CROWS_PAIRS, folder, FILES) as files:
        name = next(name for name in FILES if files.has(name))
        columns = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
        return tuple(files.records(files.table(name, columns, header=True, quoted=True), _pair))


def _pair(row: dict) -> SentencePair:
    for field, allowed in (("stereo_antistereo", DIRECTIONS), ("bias_type", BIAS_TYPES)):
        number_of(member(row, field), allowed)
    return SentencePair(member(row, "sent_more"), member(row, "sent_less"), row["stereo_antistereo"], row["bias_type"])
