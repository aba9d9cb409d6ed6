"""From a checkpoint folder of the Hub to a model of ours. Every tensor and every parameter is accounted for."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.files import read_json
from minillm.models.build import Model, build, build_body
from minillm.models.config import ModelConfig
from minillm.models.families.configs import choose_architecture, find_family, head_config, read_config
from minillm.models.families.family import LM, Architecture, Family
from minillm.models.families.keys import Entry, entries, matches, tied_keys
from minillm.models.families.source import Source
from minillm.models.heads import Head, HeadConfig, put_head


def load_hf(
    folder: str | Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Model | Head:
    """The model of a Hugging Face folder (config.json and weights), in eval mode.

    Without `task` it is what the checkpoint says it is. With one ("lm", "masked_lm", "classification", "multi_label",
    "regression", "tagging", "span", "choice", "embedding", or "body" for no head) the body is read and the head too
    if the file holds it; else the head is new, with `num_labels` and random weights, to be trained.
    `dtype` is that of the file unless given. Tensors are read one by one into the built model.
    Raises one ValueError that lists every key that is missing, left over, mis-shaped or not finite.
    """
    folder = Path(folder)
    where = folder / "config.json"
    theirs = read_json(where)
    if not isinstance(theirs, dict):
        raise ValueError(f"{where}: expected an object with a model_type, got {type(theirs).__name__}")
    family = find_family(theirs, where)
    source = Source(folder)
    _check_layers(family, theirs, source)
    _rename_old_keys(source)
    config = read_config(family, theirs, where)
    architecture = choose_architecture(family, theirs, task, source.shapes, where)
    if num_labels is not None and (num_labels < 1 or architecture.task not in ("classification", "tagging")):
        raise ValueError(
            f"num_labels={num_labels} for task {architecture.task!r}: labels, one at least, are what classification, "
            "multi_label, regression and tagging have; give task= one of these, or leave num_labels out"
        )
    head = head_config(architecture, theirs, task, num_labels)
    prefix = _prefix(family, architecture, source)
    config = _tie_by_content(family, architecture, config, source, prefix)
    if not config.tie_embeddings:
        _read_untied(architecture, source)
    model = _build_empty(config, architecture, head, where)
    fresh = _fill(model, family, architecture, prefix, source, device, dtype, chosen=task is not None)
    model.origin = {"family": family.name, "config": theirs}
    if fresh:
        names = ", ".join(fresh)
        warnings.warn(
            f"{folder} has no head for task {architecture.task!r}: {names} start with random weights and must be "
            f"trained (beside a LoRA: LoraConfig(trainable={tuple(fresh)}))",
            stacklevel=3,
        )
    return model.eval()


def _rename_old_keys(source: Source) -> None:
    """Checkpoints converted from TensorFlow call a norm's weight gamma and its bias beta."""
    for key in list(source.shapes):
        module, _, leaf = key.rpartition(".")
        if leaf in ("gamma", "beta"):
            source.rename(key, f"{module}.{'weight' if leaf == 'gamma' else 'bias'}")


def _prefix(family: Family, architecture: Architecture, source: Source) -> str:
    """What stands before the body's keys in this file, which need not be what the architecture writes today."""
    embedding = next(
        theirs for ours, theirs in family.modules.items() if ours in ("embed_tokens", "encoder.embed_tokens")
    )
    prefixes = dict.fromkeys([architecture.prefix, *(a.prefix for a in family.architectures)])
    return next((p for p in prefixes if f"{p}{embedding}.weight" in source.shapes), architecture.prefix)


def _tie_by_content(
    family: Family, architecture: Architecture, config: ModelConfig, source: Source, prefix: str
) -> ModelConfig:
    """A head that the file holds, different from the embedding, is not tied whatever the config says."""
    if not config.tie_embeddings or architecture.task not in (LM, "masked_lm"):
        return config
    embedding = next(f"{prefix}{theirs}.weight" for ours, theirs in family.modules.items() if "embed_tokens" in ours)
    head = next(
        theirs if theirs.endswith("weight") else f"{theirs}.weight"
        for ours, theirs in architecture.modules.items()
        if ours.endswith(("lm_head", "lm_head.weight"))
    )
    both = head in source.shapes and embedding in source.shapes
    if both and source.shapes[head] == source.shapes[embedding] and not _same(source, head, embedding):
        return ModelConfig(**{**vars(config), "tie_embeddings": False})
    return config


def _read_untied(architecture: Architecture, source: Source) -> None:
    """Let what transformers reads stand for what it does not; if several do, one, which the others must repeat."""
    for unused in dict.fromkeys(architecture.untied.values()):
        read = [key for key, of in architecture.untied.items() if of == unused and key in source.shapes]
        if read:
            source.rename(read[0], unused)


def _same(source: Source, one: str, other: str) -> bool:
    return torch.equal(source.read(one), source.read(other))


def _check_layers(family: Family, theirs: dict[str, Any], source: Source) -> None:
    """Refuse a config that speaks of more layers than the file could hold, before anything is made for each."""
    for ours in ("num_layers", "num_decoder_layers"):
        layers = theirs.get(family.fields[ours][0]) if ours in family.fields else None
        if isinstance(layers, int) and layers > len(source.shapes):
            raise ValueError(
                f"{source.folder}: config.json speaks of {layers} layers, but the weights hold only "
                f"{len(source.shapes)} tensors"
            )


def _build_empty(config: ModelConfig, architecture: Architecture, head: HeadConfig | None, where: Path) -> Model | Head:
    """The model on the meta device: shapes only, no memory."""
    try:
        with torch.device("meta"):
            if architecture.task == LM:
                return build(config)
            body = build_body(config)
            return body if head is None else put_head(body, head)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{where}: sizes that no model can have: {str(error).splitlines()[0]}") from None


def _fill(
    model: nn.Module,
    family: Family,
    architecture: Architecture,
    prefix: str,
    source: Source,
    device: torch.device | str,
    dtype: torch.dtype | None,
    *,
    chosen: bool,
) -> list[str]:
    """Give every parameter its values; returns the modules of a head that the file does not hold."""
    wanted = entries(family, architecture, model, prefix)
    fresh = _fresh_modules(model, wanted, source) if chosen else []
    read = [e for e in wanted if _module(e.parameters[0]) not in fresh]
    repeats = tied_keys(family, architecture, model, prefix)
    wrong = _accounts(family, architecture, source, read, repeats, chosen)
    if wrong:
        raise ValueError(
            f"{source.folder}: {len(wrong)} tensors do not fit {architecture.name}:\n  " + "\n  ".join(wrong)
        )
    for entry in read:
        for name in entry.parameters:
            _set_empty(model, name, device, dtype or source.dtypes[entry.key])
        entry.read(source, {name: model.get_parameter(name).data for name in entry.parameters})
        source.forget(entry.key)
    for name in (name for entry in wanted if entry not in read for name in entry.parameters):
        _initialise(model, name, device, dtype)
    model.tie_weights()
    if broken := [name for name, parameter in model.named_parameters() if not _finite(parameter)]:
        raise ValueError(
            f"{source.folder}: weights are not finite (NaN or infinity): {', '.join(broken)}. The file is damaged, or "
            "the training that wrote it had diverged."
        )
    return fresh


def _fresh_modules(model: nn.Module, wanted: list[Entry], source: Source) -> list[str]:
    """The head's modules of which the file holds nothing that fits."""
    head = [e for e in wanted if isinstance(model, Head) and not e.parameters[0].startswith("body.")]
    held = {_module(e.parameters[0]) for e in head if _holds(source, e)}
    return [module for module in dict.fromkeys(_module(e.parameters[0]) for e in head) if module not in held]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _holds(source: Source, entry: Entry) -> bool:
    return source.shapes.get(entry.key) == entry.shape


def _accounts(
    family: Family, architecture: Architecture, source: Source, read: list, repeats: dict[str, str], chosen: bool
) -> list[str]:
    """Every misfit between the file and what is to be read, one line each."""
    wanted = {entry.key: entry for entry in read}
    wrong = [f"missing:    {key} {entry.shape}" for key, entry in wanted.items() if key not in source.shapes]
    for key, entry in wanted.items():
        if key not in source.shapes:
            continue
        if source.shapes[key] != entry.shape:
            wrong.append(f"mis-shaped: {key}: the file has {source.shapes[key]}, the config asks for {entry.shape}")
        if not source.dtypes[key].is_floating_point:
            wrong.append(f"wrong type: {key}: {source.dtypes[key]}; weights are floating-point, not quantised")
    for key, shape in source.shapes.items():
        if key in wanted or matches(family.ignored, key):
            continue
        if key in repeats:
            if repeats[key] in wanted and repeats[key] in source.shapes and not _same(source, key, repeats[key]):
                wrong.append(f"different:  {key} should repeat {repeats[key]}")
        elif key in architecture.zeros:
            if source.read(key).any():
                wrong.append(f"not zero:   {key}: a bias on the logits is not supported")
        elif not matches(architecture.unused, key) and not (chosen and _of_some_head(family, key)):
            wrong.append(f"unexpected: {key} {shape}")
    return wrong


def _of_some_head(family: Family, key: str) -> bool:
    """Whether the key belongs to a head of the family: left out when the caller chose what to build."""
    for architecture in family.architectures:
        theirs = [name.format(prefix=architecture.prefix) for name in architecture.modules.values()]
        if key in architecture.zeros or key in architecture.untied or matches(architecture.unused, key):
            return True
        if any(key == name or key.startswith(f"{name}.") for name in theirs):
            return True
    return key in {again.format(prefix="") for again in family.repeats}


def _set_empty(model: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    empty = torch.empty(model.get_parameter(name).shape, device=device, dtype=dtype)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(empty))
    return empty


def _initialise(model: nn.Module, name: str, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Random values for a head's weight, zero for its bias, one for its norm."""
    value = _set_empty(model, name, device, dtype or model.embed_tokens.weight.dtype)
    if name.endswith("weight") and not name.endswith("norm.weight"):
        value.normal_(std=model.config.init_std)
    else:
        value.fill_(1.0 if name.endswith("weight") else 0.0)


def _finite(parameter: Tensor) -> bool:
    low, high = parameter.aminmax()  # NaN if there is one; and no second tensor, as isfinite would make
    return bool(low.isfinite() and high.isfinite())
