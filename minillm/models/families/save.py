"""From a model of ours to a folder that transformers loads."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.files import atomic_folder, write_json
from minillm.models.config import ModelConfig
from minillm.models.families import FAMILIES
from minillm.models.families.configs import misfits, read_config, write_config, write_head
from minillm.models.families.family import BODY, LM, TOKEN_IDS, Architecture, Family
from minillm.models.families.keys import Names, entries
from minillm.models.heads import Head
from minillm.models.io import check_described
from minillm.tokenizers import Tokenizer


def save_hf(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    family: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and safetensors as transformers does, so that it loads the model and answers the same.

    `family` ("Llama", "BERT", ...) is found from the model's config unless given. What a config.json that the model was
    loaded from says beyond our config, such as token ids, is kept; for other models `tokenizer` gives them. Tied
    weights are stored once. Files of more than `max_shard_bytes` are split.
    Raises ValueError when no family can hold the model, with the reason of each.
    """
    config = model.config
    if not isinstance(config, ModelConfig):
        raise ValueError(f"the Hub has no family for a {type(model).__name__}: keep it with minillm.models.save_model")
    found = family_for(config, family, getattr(model, "origin", None))
    architecture = architecture_for(found, model)
    _refuse_foreign(found, architecture, model)
    check_described(model)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {e.key: e.join(values).cpu() for e in entries(found, architecture, model, architecture.prefix)}
    dtype = next(iter(values.values())).dtype
    for key, shape in architecture.zeros.items():
        tensors[key] = torch.zeros(shape(config), dtype=dtype)
    if not config.tie_embeddings:
        tensors |= {key: tensors[repeated].clone() for key, repeated in architecture.untied.items()}
    described = _describe(model, found, tokenizer) | {
        "architectures": [architecture.name],
        "dtype": str(dtype).removeprefix("torch."),
    }
    with atomic_folder(folder) as temporary:
        _write_weights(tensors, temporary, max_shard_bytes)
        write_json(temporary / "config.json", described)


def family_for(config: ModelConfig, name: str | None, origin: dict[str, Any] | None) -> Family:
    """The family of that name, else of the file it came from, else the first that fits; ValueError if none does."""
    first = name or (origin or {}).get("family")
    known = {family.name: family for family in FAMILIES}
    if name is not None and name not in known:
        raise ValueError(f"family {name!r} is not one of {', '.join(known)}")
    candidates = [known[first]] if first else [f for f in FAMILIES]
    reasons = {}
    for family in candidates:
        reasons[family.name] = misfits(family, config)
        if not reasons[family.name]:
            return family
    lines = [f"{name}: {'; '.join(wrong)}" for name, wrong in sorted(reasons.items(), key=lambda pair: len(pair[1]))]
    raise ValueError("no model family of the Hub computes what this model does:\n  " + "\n  ".join(lines))


def architecture_for(family: Family, model: nn.Module) -> Architecture:
    """The class of transformers that has the model's head."""
    if isinstance(model, Head):
        return family.architecture(model.head_config.task)
    return family.architecture(LM if getattr(model, "lm_head", None) is not None else BODY)


def _refuse_foreign(family: Family, architecture: Architecture, model: nn.Module) -> None:
    names = Names(family, architecture, architecture.prefix, headed=isinstance(model, Head))
    if foreign := [name for name, _ in model.named_parameters() if not names.known(name)]:
        raise ValueError(
            f"{architecture.name} has no place for {len(foreign)} of the model's parameters "
            f"({', '.join(foreign[:4])}, ...). Fold adapters into the weights first (minillm.peft.merge), or save them "
            "alone (save_adapter)"
        )


def _describe(model: nn.Module, family: Family, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The fields of config.json; those of the file it came from stay where they say the same."""
    written = write_config(family, model.config)
    head = model.head_config if isinstance(model, Head) else None
    origin = getattr(model, "origin", None)
    ids = {name: getattr(tokenizer, name.replace("token_", "")) for name in TOKEN_IDS} if tokenizer else {}
    if origin is None or origin["family"] != family.name:
        return written | family.token_ids | ids | write_head(head)
    theirs = dict(origin["config"])
    kept = read_config(family, theirs, "config.json") == model.config
    labels = write_head(head)
    if len(theirs.get("id2label") or {}) == len(labels.get("id2label", ())):
        labels = {}
    return (theirs if kept else theirs | written) | ids | labels


def _write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for key, tensor in tensors.items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(tensor) > max_shard_bytes:
            shards.append({})
        shards[-1][key] = tensor
    if len(shards) == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    total = sum(map(_bytes, tensors.values()))
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
