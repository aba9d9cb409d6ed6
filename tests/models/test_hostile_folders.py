"""Damaged, lying and malicious checkpoint folders: each ends in one clear error, runs nothing, allocates little."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minillm
from minillm.models import HeadConfig, ModelConfig, build, build_with_head, save_hf

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24}
PLAIN = {"norm": "layer", "mlp": "plain", "attention_bias": True, "mlp_bias": True, "max_positions": 32}
ENCODER = {"kind": "encoder", "positions": "learned", "norm_first": False, "embed_norm": True, "activation": "gelu"}
ENCODER |= PLAIN | {"norm_eps": 1e-12}
MODELS = {  # family -> (config, task of its head)
    "Llama": (ModelConfig(**SIZES, num_kv_heads=2), None),
    "GPT-2": (ModelConfig(**SIZES, **PLAIN, positions="learned", activation="gelu_tanh"), None),
    "Phi-3": (ModelConfig(**SIZES, tie_embeddings=False), None),
    "Qwen 3": (ModelConfig(**SIZES, qk_norm=True), None),
    "BERT": (ModelConfig(**SIZES, **ENCODER, token_types=2), "masked_lm"),
    "RoBERTa": (ModelConfig(**SIZES, **ENCODER, token_types=1), "classification"),
    "DistilBERT": (ModelConfig(**SIZES, **ENCODER), "tagging"),
    "T5": (
        ModelConfig(
            **SIZES, kind="encoder_decoder", positions="relative", mlp="plain", activation="relu", max_positions=2**20
        ),
        None,
    ),
    "BART": (
        ModelConfig(
            **SIZES,
            **PLAIN,
            kind="encoder_decoder",
            positions="learned",
            norm_first=False,
            norm_eps=1e-5,
            embed_norm=True,
            activation="gelu",
        ),
        None,
    ),
}
NAMES = {"hidden": {"GPT-2": "n_embd", "DistilBERT": "dim", "T5": "d_model", "BART": "d_model"}}
NAMES["heads"] = {"GPT-2": "n_head", "DistilBERT": "n_heads", "T5": "num_heads", "BART": "encoder_attention_heads"}
NAMES["layers"] = {"GPT-2": "n_layer", "DistilBERT": "n_layers", "T5": "num_layers", "BART": "encoder_layers"}
DEFAULTS = {"hidden": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers"}
EMBEDDING = {"Llama": "model.embed_tokens.weight", "Phi-3": "model.embed_tokens.weight"}
EMBEDDING |= {"Qwen 3": "model.embed_tokens.weight", "GPT-2": "transformer.wte.weight", "T5": "shared.weight"}
EMBEDDING |= {f: f"{p}.embeddings.word_embeddings.weight" for f, p in (("BERT", "bert"), ("RoBERTa", "roberta"))}
EMBEDDING |= {"DistilBERT": "distilbert.embeddings.word_embeddings.weight", "BART": "model.shared.weight"}


class Box:
    """A checkpoint folder to spoil."""

    def __init__(self, folder: Path, family: str):
        self.folder, self.family = folder, family
        self.config, self.weights = folder / "config.json", folder / "model.safetensors"

    def named(self, part: str) -> str:
        return NAMES[part].get(self.family, DEFAULTS[part])

    def set(self, **fields) -> None:
        self.config.write_text(json.dumps(json.loads(self.config.read_text()) | fields))

    def drop(self, name: str) -> None:
        fields = json.loads(self.config.read_text())
        del fields[name]
        self.config.write_text(json.dumps(fields))

    def tensors(self, change) -> None:
        tensors = load_file(self.weights)
        change(tensors, EMBEDDING[self.family])
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def pickled(self, value) -> None:
        """Only a pickle is left, with this in it."""
        self.weights.unlink()
        torch.save(value, self.folder / "pytorch_model.bin")

    def raw_header(self, header: bytes, body: bytes = b"") -> None:
        self.weights.write_bytes(struct.pack("<Q", len(header)) + header + body)


def cut(share: float):
    return lambda box: os.truncate(box.weights, int(box.weights.stat().st_size * share))


def put(value):
    """Every value of the embedding's first row becomes this one."""

    def change(tensors, embedding):
        tensors[embedding][0] = value

    return lambda box: box.tensors(change)


def tensors(change):
    return lambda box: box.tensors(change)


def size(part: str, value):
    return lambda box: box.set(**{box.named(part): value})


class Malicious:
    """Unpickled without care it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


def malicious_zip(box: Box) -> None:
    box.pickled({"weight": Malicious(box.folder / "executed")})


def malicious_legacy(box: Box) -> None:
    box.weights.unlink()
    (box.folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Malicious(box.folder / "executed")}))


def bomb(box: Box) -> None:
    """A zip that unpacks to 64 MB."""
    box.pickled(load_file(box.weights))
    path = box.folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    first = next(name for name in content if "/data/" in name)
    content[first] = bytes(1 << 26)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def huge_storage(box: Box) -> None:
    """A pickle whose tensor says that it has 2^40 elements."""
    small = torch.zeros(2)
    box.pickled({EMBEDDING[box.family]: small})
    path = box.folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in content if name.endswith("data.pkl"))
    content[name] = content[name].replace(b"K\x02t", b"\x8a\x06\x00\x00\x00\x00\x00\x01t", 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def index(weight_map):
    def spoil(box: Box) -> None:
        box.weights.rename(box.folder / "model-00001-of-00001.safetensors")
        described = {"metadata": {}, "weight_map": weight_map} if weight_map is not None else ["nothing"]
        (box.folder / "model.safetensors.index.json").write_text(json.dumps(described))

    return spoil


def twice(box: Box) -> None:
    """Two shards with the same tensors."""
    shutil.copy(box.weights, box.folder / "a.safetensors")
    shutil.move(box.weights, box.folder / "b.safetensors")
    described = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (box.folder / "model.safetensors.index.json").write_text(json.dumps(described))


def folder_for_file(name: str):
    def spoil(box: Box) -> None:
        (box.folder / name).unlink()
        (box.folder / name).mkdir()

    return spoil


def header(shape, offsets, dtype="F32"):
    def spoil(box: Box) -> None:
        described = {EMBEDDING[box.family]: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
        box.raw_header(json.dumps(described).encode(), bytes(64))

    return spoil


def other_layers(change: int):
    def spoil(box: Box) -> None:
        box.set(**{box.named("layers"): 2 + change})

    return spoil


HOSTILE = {  # name -> (how to spoil a folder, what the error says)
    "no config": (lambda box: box.config.unlink(), "config.json does not exist"),
    "empty config": (lambda box: box.config.write_text(""), "is not JSON: line 1"),
    "cut config": (lambda box: os.truncate(box.config, 50), "is not JSON"),
    "config of zeros": (lambda box: box.config.write_bytes(bytes(100)), "is not JSON"),
    "config not UTF-8": (lambda box: box.config.write_bytes(b'{"a": "\xff\xfe"}'), "not UTF-8"),
    "config is a list": (lambda box: box.config.write_text("[1, 2]"), "expected an object"),
    "config nested without end": (lambda box: box.config.write_text("[" * 100_000), "nested too deeply"),
    "config is a folder": (folder_for_file("config.json"), "config.json cannot be read"),
    "no model_type": (lambda box: box.drop("model_type"), "model_type None is not supported"),
    "unknown model_type": (lambda box: box.set(model_type="gpt_neox"), "'gpt_neox' is not supported.*Supported are"),
    "misspelt model_type": (lambda box: box.set(model_type="lama"), "the nearest is llama"),
    "model_type is a list": (lambda box: box.set(model_type=["bert"]), "is not supported"),
    "unknown architecture": (lambda box: box.set(architectures=["NoSuchModel"]), "'NoSuchModel'.* is not supported"),
    "architectures is text": (lambda box: box.set(architectures="Bert"), "architecture 'Bert' is not supported"),
    "heads do not divide": (size("heads", 5), "(head|mis-shaped|attention_heads)"),
    "no heads": (size("heads", 0), "num_heads=0: must be at least 1|attention_heads=0"),
    "negative size": (size("hidden", -16), "hidden_size=-16: must be at least 1|complex"),
    "size is text": (size("hidden", "16"), "hidden_size: expected a whole number|d_model|unsupported operand"),
    "size is a list": (size("hidden", [16]), "hidden_size: expected a whole number|d_model|unsupported operand"),
    "size is missing": (lambda box: box.drop(box.named("hidden")), "is missing"),
    "size is null": (size("hidden", None), "hidden_size|unsupported operand"),
    "size is true": (size("layers", True), "num_layers: expected a whole number"),
    "huge hidden": (size("hidden", 16 * 10**7), "mis-shaped|sizes that no model can have"),
    "absurd hidden": (size("hidden", 4 * 10**18), "mis-shaped|sizes that no model can have"),
    "more than 64 bits": (size("hidden", 4 * 10**30), "mis-shaped|sizes that no model can have"),
    "huge vocabulary": (lambda box: box.set(vocab_size=10**12), "mis-shaped|sizes that no model"),
    "other vocabulary": (lambda box: box.set(vocab_size=32), "mis-shaped.*32"),
    "no vocabulary": (lambda box: box.set(vocab_size=0), "vocab_size=0: must be at least 1"),
    "a million layers": (size("layers", 10**6), "speaks of 1[0-9]* layers, but the weights hold only"),
    "a billion layers": (size("layers", 10**9), "speaks of 1[0-9]* layers, but the weights hold only"),
    "a layer more": (other_layers(1), "missing: "),
    "a layer less": (other_layers(-1), "unexpected: "),
    "no weights": (lambda box: box.weights.unlink(), "holds no weights"),
    "weights are a folder": (folder_for_file("model.safetensors"), "holds no weights"),
    "empty weights": (lambda box: box.weights.write_bytes(b""), "not a whole safetensors file"),
    "weights cut in the header": (cut(0.02), "not a whole safetensors file"),
    "weights cut in half": (cut(0.5), "not a whole safetensors file"),
    "weights cut at the end": (cut(0.999), "not a whole safetensors file"),
    "weights too long": (lambda box: box.weights.open("ab").write(bytes(100)), "not a whole safetensors file"),
    "weights are text": (lambda box: box.weights.write_text("a" * 1000), "not a whole safetensors file"),
    "header longer than the file": (
        lambda box: box.weights.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "not a whole safetensors file",
    ),
    "header is no JSON": (lambda box: box.raw_header(b"{" * 64), "not a whole safetensors file"),
    "no tensors": (lambda box: box.raw_header(b"{}"), "hold no tensor"),
    "huge shape": (header([2**31, 2**31], [0, 64]), "not a whole safetensors file"),
    "offsets outside": (header([4, 4], [0, 2**50]), "not a whole safetensors file"),
    "negative shape": (header([-4, 4], [0, 64]), "not a whole safetensors file"),
    "unknown dtype": (header([4, 4], [0, 64], "F77"), "not a whole safetensors file"),
    "a key is missing": (tensors(lambda t, name: t.pop(name)), "missing: .*(embed|wte|shared)"),
    "a key too many": (tensors(lambda t, name: t.update(extra=torch.ones(2))), r"unexpected: extra \(2,\)"),
    "another shape": (tensors(lambda t, name: t.update({name: torch.zeros(31, 17)})), "mis-shaped.*17"),
    "a scalar": (tensors(lambda t, name: t.update({name: torch.tensor(1.0)})), r"mis-shaped.*the file has \(\)"),
    "three dimensions": (tensors(lambda t, name: t.update({name: torch.zeros(31, 16, 1)})), "mis-shaped"),
    "transposed": (
        tensors(lambda t, name: t.update({name: t[name].t().contiguous()})),
        r"mis-shaped.*the file has \(16, 31\)",
    ),
    "int8 weights": (tensors(lambda t, name: t.update({name: t[name].to(torch.int8)})), "wrong type.*quantised"),
    "bool weights": (tensors(lambda t, name: t.update({name: t[name] > 0})), "wrong type.*torch.bool"),
    "all wrong at once": (
        tensors(lambda t, name: (t.pop(name), t.update(one=torch.ones(1), two=torch.ones(2)))),
        r"(?s)3 tensors do not fit.*missing.*unexpected: one.*unexpected: two",
    ),
    "NaN": (put(float("nan")), "not finite.*NaN"),
    "infinity": (put(float("inf")), "not finite"),
    "minus infinity": (put(float("-inf")), "not finite"),
    "pickle with code": (malicious_zip, "could run code"),
    "old pickle with code": (malicious_legacy, "could run code"),
    "pickle of a module": (lambda box: box.pickled(torch.nn.Linear(2, 2)), "could run code"),
    "pickle of a list": (lambda box: box.pickled([torch.ones(2)]), "holds no table of tensors"),
    "pickle of numbers": (lambda box: box.pickled({"weight": 3.0}), "holds no table of tensors"),
    "pickle of one tensor": (lambda box: box.pickled(torch.ones(2)), "holds no table of tensors"),
    "pickle of other tensors": (lambda box: box.pickled({"weight": torch.ones(2)}), "unexpected: weight|speaks of"),
    "cut pickle": (
        lambda box: (box.pickled(load_file(box.weights)), os.truncate(box.folder / "pytorch_model.bin", 3000)),
        "pytorch_model.bin (is damaged|was not read)",
    ),
    "empty pickle": (
        lambda box: (box.weights.unlink(), (box.folder / "pytorch_model.bin").write_bytes(b"")),
        "pytorch_model.bin (is damaged|was not read)",
    ),
    "pickle of noise": (
        lambda box: (box.weights.unlink(), (box.folder / "pytorch_model.bin").write_bytes(bytes(range(256)) * 9)),
        "pytorch_model.bin (is damaged|was not read)",
    ),
    "zip bomb": (bomb, "compressed"),
    "huge storage": (huge_storage, "pytorch_model.bin (is damaged|was not read)"),
    "index outside": (index({"x": "../../secret.safetensors"}), "outside its folder"),
    "absolute index": (index({"x": "/etc/passwd"}), "outside its folder"),
    "index of another kind": (index({"x": "model.py"}), "of another kind"),
    "index without its shard": (index({"x": "model-00002-of-00002.safetensors"}), "shards are missing"),
    "index without a map": (index({}), "is no index of shards"),
    "index is a list": (index(None), "is no index of shards"),
    "index of numbers": (index({"x": 3}), "is no index of shards"),
    "the same key twice": (twice, "is in another file of the folder too"),
}
ONLY = {  # what one family can be wrong about
    ("Llama", "no base"): (lambda box: box.set(rope_theta=0.0), "rope_theta=0.0: must be a number above 0"),
    ("Llama", "base is text"): (lambda box: box.set(rope_theta="ten"), "rope_theta: expected a number"),
    ("Llama", "rope of another kind"): (
        lambda box: box.set(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "'yarn' is not supported: it is one of default, linear, llama3",
    ),
    ("Llama", "rope is a list"): (lambda box: box.set(rope_scaling=[1]), "rope_scaling: expected an object"),
    ("Llama", "rope shrinks"): (
        lambda box: box.set(rope_scaling={"rope_type": "linear", "factor": -1.0}),
        "factor=-1.0 must be at least 1",
    ),
    ("Llama", "rope without its factor"): (
        lambda box: box.set(rope_scaling={"type": "linear"}),
        "rope type 'linear' needs factor",
    ),
    ("Llama", "rope without its numbers"): (
        lambda box: box.set(rope_scaling={"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}),
        "rope type 'llama3' needs low_freq_factor",
    ),
    ("Llama", "quantised"): (
        lambda box: box.set(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config: the weights are quantised",
    ),
    ("Llama", "a list of architectures in the list"): (
        lambda box: box.set(architectures=[["LlamaForCausalLM"]]),
        "architecture .*LlamaForCausalLM.* is not supported",
    ),
    ("Llama", "part of a head turns"): (lambda box: box.set(partial_rotary_factor=0.5), "only 1.0 is supported"),
    ("Llama", "groups do not divide"): (lambda box: box.set(num_key_value_heads=3), "multiple of num_kv_heads=3"),
    ("Llama", "odd heads"): (lambda box: box.set(head_dim=3), "head_dim=3 must be even"),
    ("Llama", "no epsilon"): (lambda box: box.set(rms_norm_eps=-1.0), "norm_eps=-1.0: must be a number above 0"),
    ("Llama", "epsilon NaN"): (lambda box: box.set(rms_norm_eps=float("nan")), "norm_eps=nan: must be a number"),
    ("Llama", "unknown activation"): (lambda box: box.set(hidden_act="mish"), "hidden_act='mish': is none of"),
    ("Llama", "activation is a list"): (lambda box: box.set(hidden_act=["silu"]), "hidden_act=.*: is none of"),
    ("Llama", "dropout of 2"): (lambda box: box.set(attention_dropout=2.0), r"attention_dropout=2.0: must be in"),
    ("Qwen 3", "a billion layers"): (
        lambda box: box.set(use_sliding_window=True, sliding_window=4, num_hidden_layers=10**9),
        "speaks of 1000000000 layers",
    ),
    ("Qwen 3", "unknown layer types"): (
        lambda box: box.set(use_sliding_window=True, sliding_window=4, layer_types=["sideways", "full_attention"]),
        "layer_types=.*expected a list of full_attention and sliding_attention",
    ),
    ("GPT-2", "scaled by the layer"): (
        lambda box: box.set(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx=True: only False is supported",
    ),
    ("GPT-2", "reads an encoder"): (lambda box: box.set(add_cross_attention=True), "only False is supported"),
    ("GPT-2", "no positions"): (lambda box: box.set(n_positions=0), "max_positions=0: must be at least 1"),
    ("GPT-2", "more positions"): (lambda box: box.set(n_positions=10**15), "mis-shaped.*wpe"),
    ("BERT", "relative positions"): (
        lambda box: box.set(position_embedding_type="relative_key"),
        "position_embedding_type='relative_key': only 'absolute' is supported",
    ),
    ("BERT", "a decoder"): (lambda box: box.set(is_decoder=True), "is_decoder=True: only False is supported"),
    ("RoBERTa", "another padding"): (lambda box: box.set(pad_token_id=0), "pad_token_id=0: only 1 is supported"),
    ("RoBERTa", "positions for padding only"): (
        lambda box: box.set(max_position_embeddings=2),
        "max_positions=0: must be at least 1",
    ),
    ("RoBERTa", "other labels"): (
        lambda box: box.set(id2label={str(i): f"L{i}" for i in range(7)}),
        "mis-shaped.*classifier.*7",
    ),
    ("T5", "embedding told twice, differently"): (
        tensors(lambda t, name: t.update({"encoder.embed_tokens.weight": t[name] + 1})),
        "different:  encoder.embed_tokens.weight should repeat shared.weight",
    ),
    ("RoBERTa", "a head that is none"): (
        lambda box: box.set(id2label=3, num_labels="two", problem_type=[1], classifier_dropout="much"),
        "problem_type=.*a name\n.*id2label=3: .*an object\n.*num_labels='two': .*\n.*classifier_dropout='much'",
    ),
    ("RoBERTa", "ReLU"): (lambda box: box.set(hidden_act="relu"), "hidden_act='relu': only 'gelu' is supported"),
    ("T5", "no width"): (
        lambda box: box.set(d_model=0, scale_decoder_outputs=True),
        "hidden_size=0: must be at least 1",
    ),
    ("BART", "sines"): (lambda box: box.set(static_position_embeddings=True), "static_position_embeddings=True: only"),
    ("T5", "unknown MLP"): (lambda box: box.set(feed_forward_proj="twice-gelu"), "feed_forward_proj='twice-gelu'"),
    ("T5", "start outside"): (lambda box: box.set(decoder_start_token_id=99), "decoder_start_id=99 is outside"),
    ("BART", "a bias on logits"): (
        tensors(lambda t, name: t["final_logits_bias"].fill_(1.0)),
        "not zero:   final_logits_bias",
    ),
    ("BART", "unequal sides"): (lambda box: box.set(decoder_ffn_dim=99), "only equal ones are supported"),
}
CASES = [(family, name, *case) for family in ("Llama", "GPT-2", "BERT", "BART") for name, case in HOSTILE.items()]
CASES += [(family, name, *case) for (family, name), case in ONLY.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a good folder."""
    made = {}
    for family, (config, task) in MODELS.items():
        torch.manual_seed(0)
        model = build(config) if task is None else build_with_head(config, _head(family, task))
        made[family] = tmp_path_factory.mktemp("good") / "model"
        save_hf(model, made[family], family=family)
    return made


def _head(family: str, task: str) -> HeadConfig:
    return HeadConfig(task=task, dense="tanh" if task == "classification" else None)


def peak_memory() -> int:
    """The most bytes this process has held since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def test_the_folders_are_good_before_they_are_spoilt(folders):
    assert len(CASES) >= 200
    for family, folder in folders.items():
        assert minillm.load(folder).origin["family"] == family


@pytest.mark.parametrize("family, name, spoil, message", CASES, ids=[f"{f}: {n}" for f, n, *_ in CASES])
def test_a_hostile_folder_ends_in_one_clear_error(family, name, spoil, message, folders, tmp_path):
    box = Box(Path(shutil.copytree(folders[family], tmp_path / "model")), family)
    spoil(box)
    measured = Path("/proc/self/clear_refs").exists()
    if measured:
        reset_peak()
        before = peak_memory()
    with pytest.raises(ValueError, match=message) as caught:
        minillm.load(box.folder)
    assert not (box.folder / "executed").exists()
    assert str(box.folder) in str(caught.value), "the error names the folder"
    if measured:
        assert peak_memory() - before < 32e6, "a folder of some 50 kB made the process grow"
