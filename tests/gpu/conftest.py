"""What the tests of our CUDA kernels share."""

import pytest

from minillm.ops import native
from minillm.ops.build import build


@pytest.fixture(scope="session")
def cuda_kernels():
    """The CUDA kernels, built now if they are not; skips where there is no nvcc."""
    if reason := native.obstacle("cuda"):
        pytest.skip(f"no CUDA kernels: {reason}")
    build("cuda")
    assert native.loaded() and "cuda" in native._devices, "another library was loaded before this one was built"
