"""`minillm kernels`: what it says, and that it says it of what is there."""

import pytest

from minillm.ops.build import obstacle


@pytest.mark.skipif(bool(obstacle("emulated")), reason=obstacle("emulated"))
@pytest.mark.parametrize("stage", ["v1", "v2", "v3", "v4", "v5"])
def test_emulate_runs_a_kernel_and_says_whether_it_is_right(cli, stage):
    code, out, _ = cli("kernels", "emulate", "attention", "--stage", stage, "--queries", "20", "--keys", "40")
    assert code == 0 and out.startswith(f"attention {stage}: 20 queries, 40 keys")
    assert float(out.rsplit(":", 1)[1]) < 2e-2
    assert len(out.splitlines()) == 3


@pytest.mark.skipif(bool(obstacle("emulated")), reason=obstacle("emulated"))
def test_emulate_traces_a_block_and_shows_what_a_mutant_breaks(cli):
    _, out, _ = cli("kernels", "emulate", "attention", "--trace")
    assert "attention_v2.cu:" in out and "all of this tile is there" in out
    code, out, _ = cli("kernels", "emulate", "attention", "--mutant", "202")
    assert code == 0 and "error: race" in out


@pytest.mark.skipif(bool(obstacle("emulated")), reason=obstacle("emulated"))
def test_emulate_refuses_what_no_kernel_takes(cli):
    code, _, err = cli("kernels", "emulate", "attention", "--stage", "v3", "--features", "40")
    assert code == 2 and "does not take this shape" in err
    code, _, err = cli("kernels", "emulate", "attention", "--queries", "70", "--keys", "40")
    assert code == 2 and "queries should be 1 to keys" in err


def test_info_names_every_op_and_every_kind_of_library(cli):
    code, out, _ = cli("kernels", "info")
    words = out.split()
    assert code == 0 and {"attention", "rope", "lora_gather", "quantized_linear", "cpu", "cuda", "emulated"} <= set(
        words
    )
