"""One door to every model: our folders, the Hub's, and names on the Hub."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from minillm.files import read_json
from minillm.models.families.load import load_hf
from minillm.models.io import load_model
from minillm.shipped import find_shipped, near_shipped, shipped_name

_WEIGHTS, _PICKLED = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
_OTHERS = ("*.json", "*.txt", "*.model", "*.jinja")


def load(
    name: str | Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> nn.Module:
    """A model in eval mode: one that minillm ships, from a folder that it or transformers wrote, or from the Hub.

    `name` is that of a shipped model (`minillm.shipped.shipped_models()`), a folder, or "org/name" on the Hub, which is
    downloaded into the Hub's own cache if the `hub` extra is installed (`revision`: a branch, tag or commit there).
    `task` and `num_labels` ask for another head than the Hub's checkpoint has: see `families.load.load_hf`. `dtype` is
    that of the file unless given; of a shipped model, kept in bfloat16 to be small, it is float32.
    Raises ValueError for what cannot be loaded, with everything that is wrong with it.
    """
    _check_place(device, dtype)
    folder = find_shipped(name)
    if not folder.is_dir():
        folder = _download(str(name), revision)
    _refuse_others(folder)
    if dtype is None and shipped_name(folder):
        dtype = torch.float32
    described = read_json(folder / "config.json")
    if isinstance(described, dict) and "format" in described:
        if task is not None or num_labels is not None:
            raise ValueError(
                f"{folder} is a model of minillm, which has the head it was saved with: leave out task and num_labels, "
                "or put another head on its body with minillm.models.put_head"
            )
        return load_model(folder, device=device, dtype=dtype)
    return load_hf(folder, task=task, num_labels=num_labels, device=device, dtype=dtype)


def _check_place(device: torch.device | str, dtype: torch.dtype | None) -> None:
    wrong = []
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        wrong.append(f"dtype {dtype!r}: expected a floating-point torch.dtype, such as torch.bfloat16")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        wrong.append(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); cpu always can")
    if wrong:
        raise ValueError("; ".join(wrong))


def _refuse_others(folder: Path) -> None:
    """Say where to go from a folder that holds no model but an adapter, or a run."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter: load the model it was trained on, then peft.load_adapter(model, folder)"
        )
    if (folder / "checkpoints").is_dir():
        inside = [name for name in ("model", "adapter") if (folder / name).is_dir()]
        raise ValueError(f"{folder} is a run: give the model in it ({', '.join(inside) or 'it has none yet'})")


def _download(name: str, revision: str | None) -> Path:
    """The folder in the Hub's cache, with the weights as safetensors if there are any."""
    if Path(name).exists():
        raise ValueError(f"{name} is a file: give the folder that holds it and its config.json")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"{name} is no folder (working folder: {os.getcwd()}), and no name on the Hub: org/name{near_shipped(name)}"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f'{name} is no folder here. To download it from the Hub: pip install "minillm[hub]". Or get config.json, '
            f"the safetensors and the tokenizer's files from https://huggingface.co/{name} and give their folder."
        ) from None
    try:  # without network, snapshot_download finds what was downloaded before
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_WEIGHTS, *_OTHERS]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_PICKLED, *_OTHERS]))
        return folder
    except Exception as error:  # the Hub's client has changed its HTTP library, and so its errors, more than once
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} is no folder here (working folder: {os.getcwd()}) and could not be downloaded: {reason}. Check "
            "the name and the network (and for gated models `hf auth login`), or get its files elsewhere and give "
            "their folder."
        ) from error
