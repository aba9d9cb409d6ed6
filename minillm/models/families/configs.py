"""Between the Hub's config.json and ours: the tables of `Family`, read in both directions."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillm.config import from_dict, nearest, to_dict
from minillm.models.config import ModelConfig
from minillm.models.families import FAMILIES
from minillm.models.families.family import ACTIVATION_NAMES, BODY, LM, REQUIRED, Architecture, Family
from minillm.models.heads import HeadConfig

_PROBLEMS = {"multi_label_classification": "multi_label", "regression": "regression"}
_HEAD_FIELDS = {
    "problem_type": (str, "a name"),
    "id2label": (dict, "an object"),
    "num_labels": (int, "a whole number"),
    "classifier_dropout": (int | float, "a number"),
    "seq_classif_dropout": (int | float, "a number"),
}


def find_family(theirs: dict[str, Any], where: Path | str) -> Family:
    """The family that a config.json names; ValueError with the supported ones and the nearest."""
    kind = theirs.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types and family.applies(theirs):
            return family
    known = sorted({name for family in FAMILIES for name in family.model_types})
    raise ValueError(
        f"{where}: model_type {kind!r} is not supported; the nearest is {nearest(str(kind), known)}. "
        f"Supported are {', '.join(known)}."
    )


def read_config(family: Family, theirs: dict[str, Any], where: Path | str) -> ModelConfig:
    """Our config of what theirs describes; ValueError listing every field that is missing, wrong or not supported."""
    wrong, values = [], dict(family.fixed)
    for ours, (name, default) in family.fields.items():
        value = theirs.get(name, default)
        if value is REQUIRED:
            wrong.append(f"{name}: is missing")
        elif ours == "activation" and not (isinstance(value, str) and value in ACTIVATION_NAMES):
            wrong.append(f"{name}={value!r}: is none of {', '.join(ACTIVATION_NAMES)}")
        else:
            values[ours] = ACTIVATION_NAMES[value] if ours == "activation" else value
    for name, accepted in family.demanded.items():
        if theirs.get(name, accepted[0]) not in accepted:
            wrong.append(f"{name}={theirs[name]!r}: only {accepted[0]!r} is supported")
    wrong += [
        f"{name}={theirs[name]!r}: expected {what}"
        for name, (kind, what) in _HEAD_FIELDS.items()
        if theirs.get(name) is not None and not isinstance(theirs[name], kind)
    ]
    if theirs.get("quantization_config"):
        wrong.append("quantization_config: the weights are quantised; get the checkpoint that they were made from")
    if not wrong:
        try:
            values |= family.read(theirs)
        except (ValueError, TypeError, KeyError) as error:
            wrong.append(str(error))
    if not wrong:
        try:
            return from_dict(ModelConfig, {name: _plain(value) for name, value in values.items()})
        except ValueError as error:
            wrong.append(str(error))
    raise ValueError(f"{where} describes no {family.name} model that can be built:\n  " + "\n  ".join(wrong))


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Their fields for our config."""
    written: dict[str, Any] = {"model_type": family.model_types[0]}
    backwards = {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}
    for ours, (name, _) in family.fields.items():
        value = getattr(config, ours)
        written[name] = backwards[value] if ours == "activation" else value
    written |= {name: accepted[0] for name, accepted in family.demanded.items() if accepted[0] is not None}
    return written | family.write(config)


def misfits(family: Family, config: ModelConfig) -> list[str]:
    """Why a model with this config is none of the family; an empty list if it is one."""
    wrong = [
        f"{name}={getattr(config, name)!r}, not {value!r}"
        for name, value in family.fixed.items()
        if name != "max_positions" and getattr(config, name) != value
    ]
    if not wrong:
        try:
            theirs = write_config(family, config)
            again = read_config(family, theirs, "config.json")
        except (ValueError, KeyError) as error:
            return [str(error)]
        if not family.applies(theirs):
            return [f"{family.name} is for other configs"]
        again = replace(again, max_positions=config.max_positions)
        if "tie_embeddings" not in family.fields:  # T5: not the config but the file says whether there is a head
            again = replace(again, tie_embeddings=config.tie_embeddings)
        ours, read = to_dict(config), to_dict(again)
        wrong = [
            f"{name}={ours[name]!r}, which it would read as {read[name]!r}" for name in ours if ours[name] != read[name]
        ]
        wrong = [line for line in wrong if not line.startswith(("init_std", "attention_dropout"))]
    return wrong


def choose_architecture(
    family: Family, theirs: dict[str, Any], task: str | None, keys: Iterable[str], where: Path | str
) -> Architecture:
    """What the checkpoint says it is, or the family's architecture for `task`."""
    if task is not None:
        return family.architecture(task)
    names = theirs.get("architectures") or [family.architectures[0].name]
    known = {architecture.name: architecture for architecture in reversed(family.architectures)}
    if not isinstance(names, list) or str(names[0]) not in known:
        raise ValueError(
            f"{where}: architecture {names!r} is not supported; the nearest is {nearest(str(names), known)}. "
            f"Supported are {', '.join(known)}; or give task= to choose what to build on the body."
        )
    found = known[names[0]]
    if found.task == "embedding" and not any("pooler.dense." in key for key in keys):
        return family.architecture(BODY)  # saved without its pooler
    return found


def head_config(architecture: Architecture, theirs: dict[str, Any], task: str | None, num_labels: int | None):
    """The head's config with the labels and dropout that theirs asks for; None for an LM head and for no head."""
    if architecture.task in (LM, BODY):
        return None
    head, task = architecture.head, task or _PROBLEMS.get(theirs.get("problem_type"), architecture.task)
    if architecture.task != "classification":
        task = architecture.task
    labels = num_labels or theirs.get("num_labels") or len(theirs.get("id2label") or {}) or head.num_labels
    drops = architecture.task in ("classification", "tagging", "choice")
    names = ("classifier_dropout", "dropout" if task == "tagging" else "seq_classif_dropout", "hidden_dropout_prob")
    dropout = next((theirs[name] for name in names if drops and theirs.get(name) is not None), None)
    return HeadConfig(
        task=task,
        num_labels=1 if task == "choice" else 2 if task == "span" else labels,
        pool=head.pool,
        dense=head.dense,
        bias=head.bias,
        dropout=head.dropout if dropout is None else dropout,
    )


def write_head(head: HeadConfig | None) -> dict[str, Any]:
    """Their fields for the head: the labels by number, and the kind of problem."""
    if head is None or head.task not in ("classification", "multi_label", "regression", "tagging"):
        return {}
    labels = {str(i): f"LABEL_{i}" for i in range(head.num_labels)}
    written: dict[str, Any] = {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    problem = {ours: theirs for theirs, ours in _PROBLEMS.items()}.get(head.task)
    return written | ({"problem_type": problem} if problem else {})


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, tuple | dict) else value
