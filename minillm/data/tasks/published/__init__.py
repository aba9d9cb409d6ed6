"""Published data sets: they are not part of minillm, and are read from a folder that their user names.

`load("sst2", "data/sst2")`; the folder may be the set's own or the one of all sets, and without one the environment
variable MINILLM_DATA names it. Nothing is fetched unless `download` is called.

A new set is a function in a file of its family, with a `Source` that says where it comes from, and a line in PUBLISHED;
a line in pins.json for each file makes it downloadable.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minillm.data.tasks.task import Record, Task
from minillm.later import later

__getattr__ = later(__name__, {"download": "fetching", "left_out": "fetching"})
HERE = __name__
PUBLISHED: Mapping[str, str] = MappingProxyType(
    {
        name: f"{HERE}.{place}"
        for name, place in {
            "acl_arc": "science.acl_arc",
            "chemprot": "science.chemprot",
            "en_sl": "rewriting.en_sl",
            "few_boolq": "fewglue.boolq",
            "few_cb": "fewglue.cb",
            "few_copa": "fewglue.copa",
            "few_multirc": "fewglue.multirc",
            "few_rte": "fewglue.rte",
            "few_wic": "fewglue.wic",
            "few_wsc": "fewglue.wsc",
            "mr": "sentences.mr",
            "multi30k": "rewriting.multi30k",
            "rte": "pairs.rte",
            "scicite": "science.scicite",
            "scierc": "science.scierc",
            "scitldr": "rewriting.scitldr",
            "si_nli": "pairs.si_nli",
            "slo_boolq": "slo_superglue.boolq",
            "slo_cb": "slo_superglue.cb",
            "slo_copa": "slo_superglue.copa",
            "slo_multirc": "slo_superglue.multirc",
            "slo_rte": "slo_superglue.rte",
            "slo_wsc": "slo_superglue.wsc",
            "sms_spam": "sentences.sms_spam",
            "sst2": "sentences.sst2",
            "stsb": "pairs.stsb",
            "subj": "sentences.subj",
            "ud_en_pos": "tagging.ud_en_pos",
            "ud_sl_ner": "tagging.ud_sl_ner",
            "ud_sl_pos": "tagging.ud_sl_pos",
            "wnut17": "tagging.wnut17",
        }.items()
    }
)
UNLABELLED: Mapping[str, str] = MappingProxyType(
    {
        "rte": f"{HERE}.pairs.rte_unlabelled",
        "si_nli": f"{HERE}.pairs.si_nli_unlabelled",
        "slo_boolq": f"{HERE}.slo_superglue.boolq_unlabelled",
        "slo_cb": f"{HERE}.slo_superglue.cb_unlabelled",
        "slo_copa": f"{HERE}.slo_superglue.copa_unlabelled",
        "slo_multirc": f"{HERE}.slo_superglue.multirc_unlabelled",
        "slo_rte": f"{HERE}.slo_superglue.rte_unlabelled",
        "slo_wsc": f"{HERE}.slo_superglue.wsc_unlabelled",
    }
)


def load(name: str, folder: str | Path | None = None, **options: Any) -> Task:
    """A published set as a task; `options` are those of its function: `fold` of "mr", `language` of "stsb"."""
    return _function(name, PUBLISHED, options)(folder, **options)


def unlabelled(name: str, folder: str | Path | None = None) -> list[tuple[str, Record]]:
    """The test records whose labels are secret, each with its name in a submission; their label is IGNORE."""
    return _function(name, UNLABELLED, {})(folder)


def _function(name: str, places: Mapping[str, str], options: Mapping[str, Any]) -> Callable[..., Any]:
    if name not in places:
        raise ValueError(f"no published set {name!r}: one of {', '.join(places)}")
    module, function = places[name].rsplit(".", 1)
    found = getattr(importlib.import_module(module), function)
    known = [option for option in inspect.signature(found).parameters if option != "folder"]
    if strange := [option for option in options if option not in known]:
        raise ValueError(f"{name} has no option {', '.join(strange)}; it has {', '.join(known) or 'none'}")
    return found
