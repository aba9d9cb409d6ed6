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
from minillm.models.config import ModelConfig
from minillm.models.decoder import Decoder, build

FORMAT = 1  # raised when an older minillm could not read what a newer one writes


def save_model(model: Decoder, folder: str | Path) -> None:
    """Write the model's config, weights and their checksum to `folder`, whole or not at all.

    Tied weights are stored once. What else a folder should hold, such as the tokenizer, is added by the caller.
    """
    with atomic_folder(folder) as temporary:
        save_file(dict(model.named_parameters()), temporary / "model.safetensors", metadata={"format": "pt"})
        described = {
            "format": FORMAT,
            "model": to_dict(model.config),
            "tokenizer_fingerprint": model.tokenizer_fingerprint,
            "weights_sha256": sha256_file(temporary / "model.safetensors"),
        }
        write_json(temporary / "config.json", described | {"sha256": _hash(described)})


def load_model(folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
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
    config = from_dict(ModelConfig, described["model"], where=f"{folder / 'config.json'}: ")
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise ValueError(f"{folder} has a config.json but no model.safetensors")
    if sha256_file(weights) != described["weights_sha256"]:
        raise ValueError(f"{weights} is damaged: its checksum is not the one in config.json. Copy it again or retrain.")
    with torch.device("meta"):
        model = build(config)  # shapes only: the weights come from the file, not from a random generator
    _fill(model, weights, device, dtype)
    model.tokenizer_fingerprint = described["tokenizer_fingerprint"]
    return model.eval()


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


def _fill(model: Decoder, path: Path, device: torch.device | str, dtype: torch.dtype | None) -> None:
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
