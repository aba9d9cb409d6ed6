"""Loading a checkpoint needs the model's own memory and little more, whatever the file's layout and precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.models import ModelConfig, build, save_hf

SIZES = {"vocab_size": 2000, "hidden_size": 512, "num_layers": 8, "num_heads": 8}
GPT2 = {"positions": "learned", "norm": "layer", "mlp": "plain", "activation": "gelu_tanh", "norm_eps": 1e-5}
GPT2 |= {"attention_bias": True, "mlp_bias": True}
MEASURE = """
import sys, torch, minillm
from pathlib import Path

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

folder, warm, dtype = sys.argv[1:]
dtype = None if dtype == "same" else getattr(torch, dtype)
minillm.load(warm, dtype=dtype)  # what torch imports at first use is not the model's
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = held("VmRSS")
model = minillm.load(folder, dtype=dtype)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(held("VmHWM") - before, size)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Some 100 MB as one file, as shards, as a pickle and with fused matrices; and small ones of the same kinds."""
    made = {}
    for size, layers in (("big", 8), ("small", 1)):
        root = tmp_path_factory.mktemp(size)
        config = ModelConfig(**SIZES | {"num_layers": layers}, tie_embeddings=False)
        model = build(config)
        save_hf(model, root / "single")
        save_hf(model, root / "shards", max_shard_bytes=20_000_000)
        save_hf(build(ModelConfig(**SIZES | {"num_layers": layers}, **GPT2)), root / "fused")
        (root / "pickled").mkdir()
        (root / "pickled" / "config.json").write_text((root / "single" / "config.json").read_text())
        torch.save(load_file(root / "single" / "model.safetensors"), root / "pickled" / "pytorch_model.bin")
        made[size] = root
    return made


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "layout, dtype", [("single", "same"), ("shards", "same"), ("fused", "same"), ("single", "bfloat16")]
)
def test_the_peak_is_the_model(folders, layout, dtype):
    peak, size = measure(folders, layout, dtype)
    assert peak <= 1.15 * size, f"{peak / size:.2f} times the model's {size / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_pickle_is_read_whole_but_let_go_as_it_is_copied(folders):
    peak, size = measure(folders, "pickled", "same")
    assert peak <= 1.3 * size, f"{peak / size:.2f} times the model's {size / 1e6:.0f} MB"


def measure(folders, layout: str, dtype: str) -> tuple[int, int]:
    arguments = [str(folders["big"] / layout), str(folders["small"] / layout), dtype]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    return peak, size
