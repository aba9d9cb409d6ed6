"""The tensors of a checkpoint folder, read one at a time: safetensors, sharded or not, or torch's pickled files.

Nothing in a file is ever executed: of a pickle, torch's weights-only reader takes tensors and refuses the rest.
"""

import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillm.files import read_json

SINGLE, PICKLED = "model.safetensors", "pytorch_model.bin"
CHUNK = 1 << 22  # bytes read at once: what is mapped counts as memory until its file is closed


class Source:
    """`shapes` and `dtypes` of all tensors by key; `read(key)` gives one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[Path | dict[str, Tensor], str]] = {}  # key -> where it is, and its name there
        for path in _weight_files(folder):
            self._add_pickled(path) if path.suffix == ".bin" else self._add_safetensors(path)
        if not self.shapes:
            raise ValueError(f"{folder}: its weight files hold no tensor")

    def read(self, key: str) -> Tensor:
        """The whole tensor, as stored."""
        values = torch.empty(self.shapes[key], dtype=self.dtypes[key])
        self.copy(key, values)
        return values

    def copy(self, key: str, target: Tensor, first: int = 0, columns: slice = slice(None)) -> None:
        """Fill `target` with rows `first`.. of a tensor, or with some columns of them; it may have another dtype."""
        place, name = self._places[key]
        if isinstance(place, dict):
            target.copy_(place[name] if target.dim() == 0 else _cut(place[name], first, first + len(target), columns))
        elif target.dim() == 0:
            with safe_open(place, framework="pt") as file:
                target.copy_(file.get_tensor(name))
        else:
            rows = max(1, CHUNK // max(1, self.dtypes[key].itemsize * target[:1].numel()))
            for start in range(0, len(target), rows):
                stop = min(start + rows, len(target))
                with safe_open(place, framework="pt") as file:
                    target[start:stop] = _cut(file.get_slice(name), first + start, first + stop, columns)

    def rename(self, key: str, new: str) -> None:
        """From now on call a tensor `new`."""
        for table in (self._places, self.shapes, self.dtypes):
            table[new] = table.pop(key)

    def forget(self, key: str) -> None:
        """Let go of a tensor that has been read, where it was in memory."""
        place, name = self._places[key]
        if isinstance(place, dict):
            del place[name]

    def _add(self, key: str, place: Path | dict[str, Tensor], shape, dtype: torch.dtype, path: Path) -> None:
        if key in self.shapes:
            raise ValueError(f"{path}: {key} is in another file of the folder too")
        self._places[key], self.shapes[key], self.dtypes[key] = (place, key), tuple(shape), dtype

    def _add_safetensors(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(key)
                    self._add(key, path, part.get_shape(), _DTYPES.get(part.get_dtype(), torch.uint8), path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}. Download or copy it again.") from None

    def _add_pickled(self, path: Path) -> None:
        tensors = _unpickle(path)
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise ValueError(f"{path} holds no table of tensors: expected what `torch.save(model.state_dict())` writes")
        for key, tensor in tensors.items():
            self._add(str(key), tensors, tensor.shape, tensor.dtype, path)


def _cut(stored, start: int, stop: int, columns: slice) -> Tensor:
    return stored[start:stop] if columns == slice(None) else stored[start:stop, columns]


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _unpickle(path: Path) -> object:
    try:
        if zipfile.is_zipfile(path):  # torch's format since 1.6; it compresses nothing
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it is compressed, and unpacked larger than the file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} was not read: it is damaged, or holds more than tensors, which could run code when loaded. "
            f"Get the model.safetensors of this model instead. ({reason})"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged: {reason}. Download or copy it again.") from None


def _weight_files(folder: Path) -> list[Path]:
    for name in (SINGLE, PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder, folder / f"{name}.index.json")
    raise ValueError(
        f"{folder} holds no weights: expected {SINGLE}, {PICKLED}, or shards with {SINGLE}.index.json. "
        "Was the download complete?"
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    described = read_json(index)
    keys = described.get("weight_map") if isinstance(described, dict) else None
    if not isinstance(keys, dict) or not keys or not all(isinstance(name, str) for name in keys.values()):
        raise ValueError(f"{index} is no index of shards: expected an object weight_map from key to file name")
    names = sorted(set(keys.values()))
    outside = [n for n in names if Path(n).name != n or Path(n).suffix not in (".safetensors", ".bin")]
    if outside:
        raise ValueError(
            f"{index} names files outside its folder or of another kind: {', '.join(map(json.dumps, outside))}"
        )
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: shards are missing: {', '.join(absent)}. Was the download complete?")
    return [folder / name for name in names]
