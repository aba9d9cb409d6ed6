"""Adapters in transformers' names, both ways with Hugging Face peft around the transformers model."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from minillm.finetune.hub_adapters import load_hf_adapter, save_hf_adapter
from minillm.models.families.load import load_hf
from minillm.peft import METHODS, LoraConfig, activate, flatten, load_adapter, merge, tune

FAMILIES = (
    *("gpt2", "llama", "qwen2", "phi3", "bert-classifier", "bert-span", "roberta-classifier", "camembert-tagger"),
    *("distilbert-classifier", "t5", "bart"),
)
ATTENTION = {"q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "q", "v", "c_attn", "qkv_proj"}
LORA = LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "v_proj"))
HEAD = ("classifier", "pooler.dense")


def written(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def peft_agrees(theirs, both_answer, perturb, close, tmp_path):
    """`peft_agrees(name, config)`: peft, around their model, answers as ours; and the adapter comes back to ours."""

    def check(name, config, exact=True):
        base, base_folder = theirs(name)
        ours, folder = load_hf(base_folder), tmp_path / "adapter"
        before, _ = both_answer(name, ours, base)
        tune(ours, config)
        save_hf_adapter(perturb(ours), folder, base=str(base_folder))
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        mine, answer = both_answer(name, ours, model)
        close(mine, answer)
        assert (mine - before).abs().max() > 0.01 * before.abs().max()  # else equal says nothing
        fields, tensors = written(folder)
        assert fields["base_model_name_or_path"] == str(base_folder)
        held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        held = {k: t for k, t in held.items() if not k.endswith((".original_module.bias", ".modules_to_save.bias"))}
        assert held.keys() <= tensors.keys() and all(torch.equal(held[key], tensors[key]) for key in held)
        again = load_hf(base_folder)
        load_hf_adapter(again, folder)
        close(both_answer(name, again, model)[0], mine, 0.0 if exact else 1e-5)
        return ours, model, folder

    return check


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_reads_our_lora(name, peft_agrees):
    peft_agrees(name, LORA)


@pytest.mark.parametrize("name", FAMILIES)
def test_we_read_and_write_again_what_peft_wrote(name, theirs, both_answer, perturb, close, tmp_path):
    base, base_folder = theirs(name)
    targets = {path.rpartition(".")[2] for path, _ in base.named_modules()} & ATTENTION
    task = {"llama": "CAUSAL_LM", "bert-classifier": "SEQ_CLS", "roberta-classifier": "SEQ_CLS"}.get(name)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type=task))
    perturb(model).eval().save_pretrained(tmp_path / "theirs")
    ours = load_hf(base_folder)
    load_hf_adapter(ours, tmp_path / "theirs")
    close(*both_answer(name, ours, model))
    save_hf_adapter(ours, tmp_path / "ours")
    (_, tensors), (again, back) = written(tmp_path / "theirs"), written(tmp_path / "ours")
    assert (again["r"], again["lora_alpha"], again["rank_pattern"]) == (3, 7, {})
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    assert set(back) - set(tensors) <= {f"base_model.model.{k}" for k in base.state_dict()}  # heads as they stand


@pytest.mark.parametrize("name", ["gpt2", "phi3", "roberta-classifier", "bert-masked-lm", "roberta-choice"])
def test_all_linear_layers(name, peft_agrees):
    _, model, folder = peft_agrees(name, LoraConfig(rank=2, alpha=6.0, targets=("all-linear",)))
    wrapped = {path for path, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert set(written(folder)[0]["target_modules"]) == wrapped


@pytest.mark.parametrize("name", ["gpt2-classifier", "llama-classifier", "roberta-classifier", "bart-classifier"])
def test_ranks_and_alphas_of_their_own(name, peft_agrees):
    patterns = dict(
        rank_pattern={"v_proj": 3, "up_proj": 4}, alpha_pattern={"q_proj": 5.0, "layers.1.mlp.up_proj": 9.0}
    )
    targets = ("q_proj", "v_proj", "up_proj")
    exact = name != "gpt2-classifier"  # q and v are fused there and have other scales here: one rounding of B
    peft_agrees(name, LoraConfig(rank=2, alpha=6.0, targets=targets, rslora=True, **patterns), exact)


@pytest.mark.parametrize("name", ["llama", "roberta-classifier", "t5-body", "mbart-body"])
def test_embeddings(name, peft_agrees):
    """T5's and BART's stacks have a copy each of the matrix: an adapter of the shared one would do nothing there."""
    _, _, folder = peft_agrees(name, LoraConfig(rank=2, alpha=6.0, targets=("embed_tokens", "q_proj")))
    if name == "t5-body":
        ends = {t for t in written(folder)[0]["target_modules"] if t.endswith("embed_tokens")}
        assert ends == {"encoder.embed_tokens", "decoder.embed_tokens"}


def test_a_trained_embedding_reaches_both_stacks(peft_agrees):
    config = LoraConfig(rank=2, targets=("q_proj",), trainable=("embed_tokens",))
    _, _, folder = peft_agrees("t5-body", config)
    assert written(folder)[0]["modules_to_save"] == ["encoder.embed_tokens", "decoder.embed_tokens"]


def test_two_loras_of_a_fused_matrix_become_one_of_the_sum_of_their_ranks(peft_agrees):
    _, _, folder = peft_agrees("gpt2", LORA)
    fields, tensors = written(folder)
    assert (fields["r"], fields["lora_alpha"], fields["fan_in_fan_out"]) == (4, 12, True)  # 6 / 2 = 12 / 4
    assert {key.split("c_attn.")[1]: tuple(t.shape) for key, t in tensors.items() if ".0." in key} == {
        "lora_A.weight": (4, 24),
        "lora_B.weight": (72, 4),
    }
    B = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert not B[24:48].any()  # the keys have no adapter
    assert not B[:24, 2:].any() and not B[48:, :2].any()


@pytest.mark.parametrize("method", ["ia3"])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "llama", "bert-classifier", "t5"])
def test_peft_reads_our_factors(name, method, peft_agrees):
    peft_agrees(name, METHODS[method](trainable=HEAD if "classifier" in name else ()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_we_read_peft_s_factors(name, theirs, both_answer, perturb, close, tmp_path):
    base, base_folder = theirs(name)
    targets = {"gpt2": ["c_attn", "mlp.c_proj"], "llama": ["k_proj", "down_proj"], "t5": ["k", "v", "wo"]}[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:])
    model = perturb(peft.get_peft_model(base, config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = load_hf(base_folder)
    load_hf_adapter(ours, tmp_path / "theirs")
    close(*both_answer(name, ours, model))


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bert-classifier", "bart"])
def test_peft_reads_our_biases(name, peft_agrees):
    """By a LoRA of zeros, beside which peft loads biases."""
    _, _, folder = peft_agrees(name, METHODS["bitfit"](trainable=HEAD if "classifier" in name else ()))
    assert not any(tensor.any() for key, tensor in written(folder)[1].items() if "lora_" in key)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_peft_reads_our_prompts_and_prefixes(name, method, theirs, both_answer, perturb, close, tmp_path):
    base, base_folder = theirs(name)
    ours = load_hf(base_folder)
    parts = {"parts": ("decoder",)} if method == "prefix" else {}  # of an encoder-decoder; peft has no others
    tune(ours, METHODS[method](length=3, **parts))
    save_hf_adapter(perturb(ours), tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    mine, answer = both_answer(name, ours, model)
    close(mine, answer[:, -mine.shape[1] :])  # peft answers at its virtual tokens too
    (tmp_path / "adapter" / "minillm.json").unlink()
    again = load_hf(base_folder)
    load_hf_adapter(again, tmp_path / "adapter")
    assert torch.equal(both_answer(name, again, model)[0], mine)


@pytest.mark.parametrize("method, network", [("ptuning", {}), ("prefix", {"projection_size": 5})])
def test_peft_reads_what_a_network_made(method, network, theirs, both_answer, perturb, close, tmp_path):
    base, base_folder = theirs("gpt2")
    ours = load_hf(base_folder)
    tune(ours, METHODS[method](length=3, **network))
    flatten(perturb(ours))
    save_hf_adapter(ours, tmp_path / "adapter")
    mine, answer = both_answer("gpt2", ours, peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    close(mine, answer[:, -mine.shape[1] :])


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["bert-classifier", "roberta-classifier", "distilbert-classifier", "llama-classifier"])
def test_the_classifier_is_not_lost(name, trained, peft_agrees, theirs, both_answer, close, perturb):
    """peft expects the head in the file: else it stops, or answers with the head that the base happens to have."""
    modules = HEAD if "llama" not in name else HEAD[:1]
    ours, _, folder = peft_agrees(name, LoraConfig(rank=2, targets=("q_proj",), trainable=modules * trained))
    fields, tensors = written(folder)
    head = "score" if "llama" in name else "classifier"
    assert fields["task_type"] == "SEQ_CLS" and head in fields["modules_to_save"]
    assert any(key.startswith(f"base_model.model.{head}.") for key in tensors)
    if trained:  # around a base with another head, what counts is the adapter's
        fresh, _ = theirs(name)
        perturb(fresh.get_submodule(head))
        close(*both_answer(name, ours, peft.PeftModel.from_pretrained(fresh, folder).eval()))


def test_a_task_of_peft_that_drops_token_types_is_not_named(peft_agrees, theirs, both_answer):
    _, _, folder = peft_agrees("bert-span", LORA)
    assert written(folder)[0]["task_type"] is None
    fields = written(folder)[0] | {"task_type": "QUESTION_ANS", "modules_to_save": []}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(KeyError, match="qa_outputs"):  # the reason also why its head must be in the file
        peft.PeftModel.from_pretrained(theirs("bert-span")[0], folder)


def test_the_file_weighs_what_its_tensors_weigh(peft_agrees):
    _, _, folder = peft_agrees("llama", LORA)
    count = 2 * 2 * (24 + 24) + 2 * 2 * (24 + 12)  # layers x rank x (Din + Dout), of q and of v with half the heads
    _, tensors = written(folder)
    assert sum(t.numel() for t in tensors.values()) == count
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * count + 2000


def test_merged_it_is_what_peft_merges(theirs, both_answer, peft_agrees, close):
    ours, model, _ = peft_agrees("phi3", LORA)
    merge(ours)
    close(*both_answer("phi3", ours, model.merge_and_unload()))


def test_several_adapters_by_name(theirs, perturb, both_answer, tmp_path):
    base, base_folder = theirs("gpt2")
    ours = load_hf(base_folder)
    tune(ours, LORA, "a")
    save_hf_adapter(perturb(ours), tmp_path / "a", "a")
    again = load_hf(base_folder)
    load_hf_adapter(again, tmp_path / "a", "b")
    assert torch.equal(both_answer("gpt2", ours, base)[0], both_answer("gpt2", again, base)[0])
    with pytest.raises(ValueError, match="'c'"):
        save_hf_adapter(ours, tmp_path / "c", "c")


def test_a_head_that_did_not_train_is_the_base_s_also_beside_an_adapter_with_another(theirs, perturb, tmp_path):
    base, base_folder = theirs("gpt2-classifier")
    ours = load_hf(base_folder)
    tune(ours, LoraConfig(rank=2, targets=("q_proj",), trainable=("classifier",)), "a")
    perturb(ours)
    activate(ours)
    tune(ours, LORA, "b")
    activate(ours, "a")
    save_hf_adapter(ours, tmp_path / "b", "b")
    assert torch.equal(written(tmp_path / "b")[1]["base_model.model.score.weight"], base.score.weight)


def test_a_base_in_bfloat16(theirs, perturb, tmp_path):
    _, base_folder = theirs("gpt2-classifier")
    ours = load_hf(base_folder, dtype=torch.bfloat16)
    tune(ours, LoraConfig(rank=2, targets=("q_proj",), trainable=("classifier",)))
    save_hf_adapter(perturb(ours), tmp_path / "adapter")
    again = load_hf(base_folder, dtype=torch.bfloat16)
    load_hf_adapter(again, tmp_path / "adapter")
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), again.parameters(), strict=True))


def test_what_peft_wrote_with_its_own_words(theirs, both_answer, perturb, close, tmp_path):
    """Regular expressions, excluded modules, some layers, patterns and whole modules mean what they mean to peft."""
    for number, words in enumerate(
        (
            dict(target_modules=r".*\.1\..*(q|k)_proj", rank_pattern={r".*k_proj": 5}),
            dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], alpha_pattern={"up_proj": 3}),
            dict(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.k_proj"], use_rslora=True),
            dict(target_modules="all-linear", modules_to_save=["lm_head", "norm"]),
            dict(target_modules=["embed_tokens", "v_proj"]),
        )
    ):
        base, base_folder = theirs("llama")
        model = perturb(peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=5, **words))).eval()
        model.save_pretrained(tmp_path / str(number))
        ours = load_hf(base_folder)
        load_hf_adapter(ours, tmp_path / str(number))
        close(*both_answer("llama", ours, model))


def test_without_our_record_a_fused_lora_is_read_as_peft_s(theirs, both_answer, peft_agrees, tmp_path):
    ours, model, folder = peft_agrees("phi3", LORA)
    (folder / "minillm.json").unlink()
    again = load_hf(theirs("phi3")[1])
    load_hf_adapter(again, folder)
    torch.testing.assert_close(*(both_answer("phi3", m, model)[0] for m in (again, ours)), rtol=1e-5, atol=1e-5)
    assert tuple(again.layers[0].self_attn.k_proj.lora_A.shape) == (4, 24)  # with its rows of B all zero
    save_hf_adapter(again, tmp_path / "back")
    assert written(tmp_path / "back")[0]["r"] == 4  # A is shared, so the rank does not grow


def test_load_adapter_does_not_take_it_for_ours(theirs, peft_agrees):
    _, _, folder = peft_agrees("gpt2", LORA)
    with pytest.raises(ValueError):
        load_adapter(load_hf(theirs("gpt2")[1]), folder)
