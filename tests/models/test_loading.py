"""The one door to every model: what it says when what was asked for cannot be had."""

import socket

import pytest
import torch

import minillm
from minillm.models import ModelConfig, build, save_model
from minillm.peft import LoraConfig, save_adapter, tune


@pytest.fixture
def folder(tmp_path):
    save_model(build(ModelConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2)), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_network(monkeypatch):
    """Every look-up of a host fails, as it does on a machine without network; returns the names asked for."""
    asked = []

    def fail(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    return asked


def test_a_name_on_the_hub_without_network_is_one_clear_error_at_once(no_network, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which the tests set, and a user does not
    with pytest.raises(ValueError, match=r"(?s)no/such-model is no folder here.*could not be downloaded.*the network"):
        minillm.load("no/such-model")
    assert len(no_network) <= 2  # the Hub's client is not left to try again and again


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "nowhere", "/no/where", "a/b/c", "-a/b"])
def test_a_folder_that_is_not_there_is_not_looked_up_on_the_hub(name, no_network):
    with pytest.raises(ValueError, match=r"is no folder \(working folder: .*no name on the Hub"):
        minillm.load(name)
    assert not no_network


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, 16])
def test_a_dtype_that_weights_cannot_have_is_refused(folder, dtype):
    with pytest.raises(ValueError, match=r"expected a floating-point torch\.dtype, such as torch.bfloat16"):
        minillm.load(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder, device):
    with pytest.raises(ValueError, match=f"device .{device}.*cannot be used.*cpu"):
        minillm.load(folder, device=device)


def test_what_is_no_model_folder_says_where_to_go(folder, tmp_path, no_network):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file: give the folder"):
        minillm.load(folder / "model.safetensors")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run is a run: give the model in it \(it has none yet\)"):
        minillm.load(tmp_path / "run")
    (tmp_path / "run" / "model").mkdir()
    with pytest.raises(ValueError, match=r"run is a run: give the model in it \(model\)"):
        minillm.load(tmp_path / "run")
    model = minillm.load(folder)
    tune(model, LoraConfig(rank=2, targets=("q_proj",)))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter holds an adapter: load the model .*load_adapter"):
        minillm.load(tmp_path / "adapter")
    assert not no_network
