"""Backends: selected, restored, reported; never a silent fallback for one that was asked for by name."""

import os
import subprocess
import sys

import pytest
import torch

from minillm import ops
from minillm.ops import native


def test_use_backend_selects_and_restores():
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert ops.info()["layer_norm"]["runs"] == "torch"
    with ops.use_backend("reference"):
        assert {entry["runs"] for entry in ops.info().values()} == {"reference"}
        inside = ops.layer_norm(x, weight, None, 1e-5)
    assert ops.info()["layer_norm"]["runs"] == "torch"
    torch.testing.assert_close(inside, ops.layer_norm(x, weight, None, 1e-5))


def test_the_selected_implementation_is_the_one_that_runs():
    @ops.Op
    def _probe():
        return "definition"

    try:
        assert _probe() == "definition"
        _probe.implementation("torch")(lambda: "library")
        assert _probe() == "library"
        with ops.use_backend("reference"):
            assert _probe() == "definition"
        assert "_probe" in repr(_probe) and "torch" in repr(_probe)
    finally:
        del ops.OPS["_probe"]


def test_backend_is_restored_after_an_error():
    with pytest.raises(RuntimeError), ops.use_backend("reference"):
        raise RuntimeError
    assert ops.info()["attention"]["runs"] == "torch"


def test_info_says_why_a_faster_backend_does_not_run(monkeypatch):
    assert ops.info()["attention"]["runs"] == "torch"
    assert ops.info()["attention"]["native"].startswith("not selected: the backend is 'torch'")
    assert ops.info()["layer_norm"]["native"] == "no kernel of ours: PyTorch's operations run"
    with ops.use_backend("reference"):
        assert ops.info()["attention"]["torch"] == "not selected: the backend is 'reference'"
    with ops.use_backend("auto"):
        monkeypatch.setattr(native, "_found", False)
        monkeypatch.setattr(native, "_trouble", "the library is broken")
        assert ops.info()["attention"] == {"runs": "torch", "native": "the library is broken"}
        monkeypatch.setattr(native, "_trouble", "")
        assert ops.info()["attention"]["native"].startswith("not built")


def test_unknown_backends_are_errors():
    with pytest.raises(ValueError, match="unknown backend 'cuda': choose one of auto, reference, torch, native"):
        ops.use_backend("cuda")
    assert ops.info()["attention"]["runs"] == "torch"
    code = "import minillm.ops"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MINILLM_BACKEND": "fast"}, capture_output=True, text=True
    )
    assert "MINILLM_BACKEND=fast: choose one of auto, reference, torch, native" in run.stderr


def test_nothing_falls_back_silently(monkeypatch):
    """With "auto" a refused call is counted; with "native" it is an error that says why."""

    @ops.Op
    def _probe(x):
        return "definition"

    @_probe.native(lambda x: "x is odd" if x % 2 else "", lambda x: "x is small" if x < 10 else "")
    def _kernel(x):
        return "kernel"

    monkeypatch.setattr(native, "_found", True)
    try:
        with ops.use_backend("auto"):
            assert [_probe(x) for x in (1, 2, 12, 13)] == ["definition", "definition", "kernel", "definition"]
            assert ops.info()["_probe"] == {"runs": "native", "torch": "2 calls: x is odd; 1 calls: x is small"}
        with ops.use_backend("native"):
            assert [_probe(x) for x in (2, 12)] == ["kernel", "kernel"]
            with pytest.raises(ValueError, match="_probe: the native kernel cannot run this call: x is odd"):
                _probe(1)
        with ops.use_backend("torch"):
            assert _probe(12) == "definition"
    finally:
        del ops.OPS["_probe"]
