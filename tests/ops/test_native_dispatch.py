"""Which kernels the tensors of a GPU run, asked without a GPU: tensors of shapes and a device, but no memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import ops
from minillm.ops import native
from minillm.ops.int4 import Int4Tensor
from minillm.ops.linear import SMALL, linear
from minillm.ops.quantize import QuantTensor, nf4_dequantize, nf4_quantize

pytestmark = pytest.mark.usefixtures("native_library")


class Calls(TorchDispatchMode):
    """The operations that ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))

    @property
    def ours(self) -> list[str]:
        return [name.removeprefix("minillm::") for name in self.names if name.startswith("minillm")]


@pytest.fixture
def gpu(monkeypatch):
    """As if the library had been built for a GPU, too, and there were one."""
    monkeypatch.setattr(native, "_devices", ("cpu", "cuda"))
    with FakeTensorMode(), torch.no_grad():
        yield


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def nf4(dout: int, din: int, block: int = 64, device: str = "cuda") -> QuantTensor:
    blocks = -(-dout * din // block)
    codes, absmax = (torch.empty(n, dtype=torch.uint8, device=device) for n in ((blocks, block // 2), (blocks,)))
    absmax2, offset, book, book8 = (torch.empty(n, device=device) for n in ((blocks,), (), (256, 2), (256,)))
    return QuantTensor(codes, absmax, absmax2, offset, book, book8, (dout, din))


def int4(dout: int, din: int, group: int = 32) -> Int4Tensor:
    codes = torch.empty(dout * din // group, group // 2, dtype=torch.uint8, device="cuda")
    return Int4Tensor(codes, on_gpu(dout, din // group), on_gpu(dout, din // group), on_gpu(256, 2), (dout, din))


def ran(backend: str, run) -> list[str]:
    with ops.use_backend(backend), Calls() as calls:
        run()
    return calls.ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, wanted", [(1, ["linear"]), (4, ["linear"]), (5, []), (0, [])])
def test_a_linear_layer_of_few_rows(gpu, rows, wanted, dtype):
    x, weight, bias = on_gpu(rows, 33, dtype=dtype), on_gpu(7, 33, dtype=dtype), on_gpu(7, dtype=dtype)
    assert ran("native", lambda: linear(x, weight, bias)) == wanted


def test_auto_leaves_to_torch_what_costs_a_gpu_less_than_the_call(gpu):
    x = on_gpu(1, 1024)
    assert ran("auto", lambda: linear(x, on_gpu(SMALL["cuda"] // 1024 - 1, 1024))) == []
    assert ran("auto", lambda: linear(x, on_gpu(SMALL["cuda"] // 1024, 1024))) == ["linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, din, block, wanted",
    [
        *((1, 64, 64, "linear"), (8, 96, 32, "linear"), (8, 96, 96, "linear"), (9, 64, 64, "dequantize")),
        *((1, 48, 64, "dequantize"), (1, 64, 16, "dequantize"), (8, 64, 48, "dequantize")),
    ],
)
def test_a_quantized_layer(gpu, rows, din, block, wanted, dtype):
    """Codes are multiplied where they are read, up to 8 rows and in whole sets of 32; else made into numbers first."""
    x, weight = on_gpu(rows, din, dtype=dtype), nf4(6, din, block)
    for backend in ("native", "auto"):
        assert ran(backend, lambda: ops.quantized_linear(x, weight, on_gpu(6))) == [f"nf4_{wanted}"]
    if din % block == 0:
        whole = int4(6, din, block)
        assert ran("auto", lambda: ops.quantized_linear(x, whole, on_gpu(6))) == [f"int4_{wanted}"]


def test_quantizing_and_back(gpu):
    assert ran("auto", lambda: nf4_quantize(on_gpu(3, 50), 64)) == ["nf4_quantize"]
    assert ran("auto", lambda: nf4_dequantize(nf4(3, 50), torch.bfloat16)) == ["nf4_dequantize"]
    assert ran("auto", lambda: int4(3, 64).dequantize(torch.bfloat16)) == ["int4_dequantize"]


def test_what_no_kernel_takes(gpu, monkeypatch):
    x, weight = on_gpu(2, 64), on_gpu(5, 64)
    with ops.use_backend("native"):
        for run in (
            lambda: linear(x, torch.empty(5, 64)),
            lambda: ops.quantized_linear(x, nf4(5, 64, device="cpu"), None),
            lambda: ops.quantized_linear(torch.empty(2, 64), nf4(5, 64), None),
        ):
            with pytest.raises(ValueError, match="on different devices"):
                run()
        with pytest.raises(ValueError, match="not float16"):
            linear(x.half(), weight.half())
        with monkeypatch.context() as within, pytest.raises(ValueError, match="autocast"):
            within.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
            linear(x, weight)
        with pytest.raises(ValueError, match="kernels are for cpu and cuda, not meta"):
            linear(x.to("meta"), weight.to("meta"))
        monkeypatch.setattr(native, "_devices", ("cpu",))
        for run in (lambda: linear(x, weight), lambda: ops.quantized_linear(x, nf4(5, 64), None)):
            with pytest.raises(ValueError, match="no kernels for cuda are built: run `minillm kernels build cuda`"):
                run()
