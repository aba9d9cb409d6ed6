"""Models as folders: `config.json` and `model.safetensors`. Loading accounts for every tensor and runs no code."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minillm.config import from_dict, to_dict
from minillm.files import atomic_folder, read_json, sha256_file, write_json
from minillm.models.build import MODELS, build_body
from minillm.models.config import ModelConfig
from minillm.models.heads import Head, HeadConfig, put_head

FORMAT = 1  # raised when an older minillm could not read what a newer one writes
RECURRENT = {"RecurrentLM": "recurrent", "RecurrentEncoderDecoder": "recurrent_encoder_decoder"}  # class -> kind


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write the model's config, weights and their checksum to `folder`, whole or not at all.

    Tied weights are stored once. What else a folder should hold, such as the tokenizer, is added by the caller.
    Raises ValueError for a model that its config does not describe, as with an adapter in it: it could not be loaded.
    """
    check_described(model)
    with atomic_folder(folder) as temporary:
        save_file(dict(model.named_parameters()), temporary / "model.safetensors", metadata={"format": "pt"})
        described = {
            "format": FORMAT,
            **_describe(model),
            "tokenizer_fingerprint": model.tokenizer_fingerprint,
            "weights_sha256": sha256_file(temporary / "model.safetensors"),
        }
        write_json(temporary / "config.json", described | {"sha256": _hash(described)})


def load_model(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Build the model that `folder` describes and copy its weights in, one tensor at a time.

    `dtype` is that of the file unless given. Raises ValueError when the folder is of another format, the weights do
    not match their checksum, or the tensors do not fit the model; all misfits are listed in one error.
    """
    folder = Path(folder)
    described = read_json(folder / "config.json")
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else type(described).__name__
        raise ValueError(f"{folder / 'config.json'} has format {found!r}, this minillm reads format {FORMAT}")
    if described.pop("sha256", None) != _hash(described):
        raise ValueError(f"{folder / 'config.json'} is damaged or was edited: its content does not fit its sha256")
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ValueError(f"{folder} has a config.json but no model.safetensors")
    if sha256_file(weights) != described["weights_sha256"]:
        raise ValueError(f"{weights} is damaged: its checksum is not the one in config.json. Copy it again or retrain.")
    with torch.device("meta"):
        model = build_described(described, where=f"{folder / 'config.json'}: ")  # shapes only: the file has the weights
    _fill(model, weights, device, dtype)
    model.tokenizer_fingerprint = described["tokenizer_fingerprint"]
    if described.get("origin"):
        model.origin = described["origin"]
    return model.eval()


def _describe(model: nn.Module) -> dict[str, Any]:
    """What `build_described` builds the same model from, without its weights."""
    return {
        "kind": RECURRENT.get(type(model).__name__),
        "model": to_dict(model.config),
        "head": to_dict(model.head_config) if isinstance(model, Head) else None,
        "lm_head": not isinstance(model, Head) and getattr(model, "lm_head", None) is not None,
        "origin": getattr(model, "origin", None),  # the Hub's config.json it was loaded from, for saving back
    }


def check_described(model: nn.Module) -> None:
    """Refuse a model that holds other parameters than its config says, such as adapters or quantized layers."""
    with torch.device("meta"):
        plain = {name: parameter.shape for name, parameter in build_described(_describe(model)).named_parameters()}
    given = {name: parameter.shape for name, parameter in model.named_parameters()}
    if other := [name for name in plain | given if plain.get(name) != given.get(name)]:
        raise ValueError(
            f"the config of this {type(model).__name__} does not describe all that it holds: {', '.join(other[:4])} "
            "... Fold adapters into the weights first (minillm.peft.merge), or save them alone (save_adapter); what "
            "is quantized has no weights to save"
        )


def build_described(described: dict[str, Any], where: str = "") -> nn.Module:
    """A new model of the shape that a model folder's config.json describes."""
    if described.get("kind") in RECURRENT.values():
        return _recurrent(described, where)
    config = from_dict(ModelConfig, described["model"], where=where)
    if head := described.get("head"):
        return put_head(build_body(config), from_dict(HeadConfig, head, where=where))
    return MODELS[config.kind](config) if described.get("lm_head", True) else build_body(config)


def _recurrent(described: dict[str, Any], where: str) -> nn.Module:
    from minillm.models.recurrent import RecurrentConfig, RecurrentLM
    from minillm.models.recurrent_seq2seq import RecurrentEncoderDecoder

    classes = {cls.__name__: cls for cls in (RecurrentLM, RecurrentEncoderDecoder)}
    (name,) = [name for name, kind in RECURRENT.items() if kind == described["kind"]]
    return classes[name](from_dict(RecurrentConfig, described["model"], where=where))


def _hash(described: dict[str, Any]) -> str:
    """SHA-256 of a description as canonical JSON."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters: two models with the same one compute the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _fill(model: nn.Module, path: Path, device: torch.device | str, dtype: torch.dtype | None) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            given = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
            _check_fit(path, expected, given)
            for name in expected:
                owner, _, leaf = name.rpartition(".")
                tensor = file.get_tensor(name)
                setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype or tensor.dtype)))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    model.tie_weights()


def _check_fit(path: Path, expected: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> None:
    bad = [f"missing:    {name} {expected[name]}" for name in expected if name not in given]
    bad += [f"unexpected: {name} {given[name]}" for name in given if name not in expected]
    for name in expected:
        if name in given and given[name] != expected[name]:
            bad.append(f"mis-shaped: {name}: the file has {given[name]}, the model {expected[name]}")
    if bad:
        raise ValueError(f"{path}: {len(bad)} tensors do not fit the model:\n  " + "\n  ".join(bad))
