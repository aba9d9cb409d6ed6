"""One door to every model: our folders, the Hub's, and names on the Hub."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from minillm.files import read_json
from minillm.models.families.load import load_hf
from minillm.models.io import load_model

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
    """A model in eval mode, from a folder that minillm or transformers wrote, or from the Hugging Face Hub.

    `name` is a folder, or "org/name" on the Hub, which is downloaded into the Hub's own cache if the `hub` extra is
    installed (`revision`: a branch, tag or commit there). `task` and `num_labels` ask for another head than the Hub's
    checkpoint has: see `families.load.load_hf`. `dtype` is that of the file unless given.
    Raises ValueError for what cannot be loaded, with everything that is wrong with it.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), revision)
    described = read_json(folder / "config.json")
    if isinstance(described, dict) and "format" in described:
        if task is not None or num_labels is not None:
            raise ValueError(
                f"{folder} is a model of minillm, which has the head it was saved with: leave out task and num_labels, "
                "or put another head on its body with minillm.models.put_head"
            )
        return load_model(folder, device=device, dtype=dtype)
    return load_hf(folder, task=task, num_labels=num_labels, device=device, dtype=dtype)


def _download(name: str, revision: str | None) -> Path:
    """The folder in the Hub's cache, with the weights as safetensors if there are any."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name} is no folder (working folder: {os.getcwd()}), and no name on the Hub: org/name")
    try:
        from huggingface_hub import list_repo_files, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f'{name} is no folder here. To download it from the Hub: pip install "minillm[hub]". Or get config.json, '
            f"the safetensors and the tokenizer's files from https://huggingface.co/{name} and give their folder."
        ) from None
    try:
        names = list_repo_files(name, revision=revision)
        weights = _WEIGHTS if any(n.endswith(".safetensors") for n in names) else _PICKLED
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*weights, *_OTHERS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        try:  # no network: what was downloaded before will do
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError):
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name} is no folder here and could not be downloaded: {reason}. Check the name and the network (and "
                f"for gated models `hf auth login`), or get its files elsewhere and give their folder."
            ) from None
