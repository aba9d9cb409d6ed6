"""Backends: selected, restored, reported; never a silent fallback for one that was asked for by name."""

import pytest
import torch

from minillm import ops


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


def test_info_says_why_a_faster_backend_does_not_run():
    assert ops.info()["attention"] == {"runs": "torch", "native": "not implemented"}
    with ops.use_backend("reference"):
        assert ops.info()["attention"]["torch"] == "implemented, not selected"


def test_an_absent_kernel_is_an_error():
    with pytest.raises(ValueError, match=r"native backend cannot run: no kernel for .*attention.*Use 'torch'"):
        ops.use_backend("native")
    with pytest.raises(ValueError, match="unknown backend 'cuda': choose one of reference, torch, native"):
        ops.use_backend("cuda")
    assert ops.info()["attention"]["runs"] == "torch"
