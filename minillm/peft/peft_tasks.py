"""For which task Hugging Face peft computes with a prompt or a prefix what we compute, or why for none.

Found by running peft 0.21 around models of transformers 5, which the tests repeat.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from minillm.peft.doors import entrances
from minillm.peft.names import base_modules, find

HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
LANGUAGE_MODELS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}
GENERAL = "FEATURE_EXTRACTION"  # peft's class for it takes every model
TASKS = {
    "classification": "SEQ_CLS",
    "multi_label": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "span": "QUESTION_ANS",
    "embedding": GENERAL,
    "masked_lm": GENERAL,
}
POOLED = ("classification", "multi_label", "regression", "embedding")  # that read one state for the whole text
REASON = "reason"  # the field of adapter_config.json that says why peft cannot read it


def described(model: nn.Module, peft_type: str, reason: str) -> dict[str, Any]:
    """The fields of adapter_config.json with the task; or a type that peft refuses, where there is a `reason` to."""
    task = task_of(model)
    if reason := reason or ("" if task else f"peft has no task for a {type(model).__name__}"):
        return {"peft_type": f"MINILLM_{peft_type}", REASON: reason}
    ((_, body),) = entrances(model)
    if task == "QUESTION_ANS" and body.config.token_types > 1:
        task = GENERAL  # whose class says that it drops token types; the other one drops them without a word
    return {"task_type": task}


def task_of(model: nn.Module) -> str | None:
    """peft's word for what the model is for; None where it has none."""
    head, ((_, body),) = getattr(model, "head_config", None), entrances(model)
    if head is not None:
        return TASKS.get(head.task)
    kind = getattr(body.config, "kind", None)  # recurrent models have none
    return LANGUAGE_MODELS.get(kind) if getattr(body, "lm_head", None) is not None else kind and GENERAL


def refuse_task(fields: Mapping[str, Any], model: nn.Module, reason: str) -> None:
    """Raise ValueError where peft trained it under a head that this model has not, or reads otherwise."""
    task = fields.get("task_type")
    if task in HEADED and entrances(model) and (reason or task != task_of(model)):
        other = f"and this {type(model).__name__} is for {task_of(model) or 'something that peft has no word for'}"
        raise ValueError(f"it was trained for peft's {task}, {(reason and 'but ' + reason) or other}: train again")


def saved_modules(fields: Mapping[str, Any], model: nn.Module) -> tuple[str, ...]:
    """Those of `modules_to_save` that the model has: peft writes its heads' names for every model."""
    modules = [name for name, _, _ in base_modules(model)]
    return tuple(end for end in fields.get("modules_to_save") or () if find(modules, [end], [], ""))
