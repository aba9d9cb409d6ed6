"""The native library seen from Python: found or built, loaded, and its operations made known to torch.

What torch must know of an operation beyond how to run it stands in the module that gives it to its op
(native_attention.py, ...): the shapes of its results without data (`torch.library.register_fake`), and its gradient.
"""

import importlib
import warnings
from pathlib import Path

import torch

from minillm.ops.build import BuildError, build, built, obstacle

# Importing one gives its ops their kernels.
MODULES = (
    *("native_attention", "native_rope", "native_norm", "native_linear", "native_nf4"),
    *("native_lora", "native_lora_linear", "native_lora_gather"),
)
_found: bool | None = None  # None: not looked yet
_devices: tuple[str, ...] = ()  # "cpu" and perhaps "cuda": where the loaded library has kernels
_trouble = ""  # why a library that is there could not be loaded


def loaded() -> bool:
    """Whether our operations can be called. The first call looks for a library that was built; it builds none."""
    global _found, _trouble
    if _found is None:
        _found = False  # also while looking, which may call ops
        modules = _modules()
        if path := built("cuda") or built("cpu"):
            try:
                _load(path, modules)
                _found = True
            except BuildError as error:
                _trouble = str(error)
                warnings.warn(f"{error}; until then PyTorch's operations run", stacklevel=2)
    return _found


loaded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without importing the whole compiler


def load_or_build() -> None:
    """Load the library, the processor's built now if there is none. BuildError says why it cannot be done."""
    global _found
    if not loaded():
        if _trouble:
            raise BuildError(_trouble)
        _load(build("cpu"), _modules())
        _found = True


def missing() -> str:
    """Why no kernel can run; "" if they can."""
    if loaded():
        return ""
    reason = obstacle("cpu")
    return _trouble or (f"not built, and cannot be: {reason}" if reason else "not built: run `minillm kernels build`")


def _modules() -> list:
    return [importlib.import_module(f"minillm.ops.{name}") for name in MODULES]


def _load(path: Path, modules: list) -> None:
    global _devices
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}): run `minillm kernels clean`, then build again") from error
    for module in modules:
        module.register()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    _devices = tuple(name for name in ("cpu", "cuda") if has_kernel("minillm::attention", name.upper()))


def why_not(*tensors: torch.Tensor) -> str:
    """What keeps any kernel from taking these tensors; "" if nothing."""
    first = tensors[0]
    if first.dtype not in (torch.float32, torch.bfloat16):
        return f"kernels know float32 and bfloat16, not {str(first.dtype).removeprefix('torch.')}"
    for x in tensors:
        if x.dtype != first.dtype or x.device != first.device:
            return "the tensors are of different types, or on different devices"
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return "the features do not lie side by side in memory: call .contiguous()"
    if first.device.type not in ("cpu", "cuda"):
        return f"kernels are for cpu and cuda, not {first.device.type}"
    if first.device.type not in _devices:
        return f"no kernels for {first.device.type} are built: run `minillm kernels build {first.device.type}`"
    if torch._C._are_functorch_transforms_active():
        return "torch.func's transforms know no kernels"
    return ""


def below_autograd(operation, *args):
    """Call a torch operation where no gradient is wanted, past the Python that would record one (7 microseconds)."""
    if torch.is_inference_mode_enabled():  # nothing to pass there
        return operation(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operation(*args)


def wants_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd must record a call with these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
