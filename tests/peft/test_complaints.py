"""What users of other PEFT libraries complain about, and the mistakes of small re-implementations: one test for each.

Complaints, by number, and those without one:

     1  a part of the targets matches nothing, silently     test_complaint_01_partly_wrong_targets
     2  loading does nothing or leaves random adapters      test_complaint_02_keys_that_do_not_fit
     3  merging changes results; unmerging drifts           test_complaint_03_merge_and_unmerge
     4  merging on a 4-bit base                             test_complaint_04_merge_on_a_quantized_base
     5  checkpointing and a frozen base: no gradients       test_complaint_05_gradient_checkpointing
     6  prefix tuning against caches and checkpointing      test_complaint_06_prefix_and_cache
     7  an adapter on a tied head changes the embedding     test_complaint_07_tied_embeddings
     8  the classifier is lost or new after loading         test_complaint_08_head_after_reload
     9  padding on the left, logits longer than the text    test_complaint_09_left_padding_with_a_prompt
    10  weighted sums of adapters are none                  test_complaint_10_weighted_sum
    11  bottleneck adapters never came                      test_complaint_11_bottleneck_adapters
    12  QA-LoRA cannot be merged                            test_complaint_12_merge_of_qalora
    13  eval() merges, or should and does not; fused layers test_complaint_13_eval_never_merges
    14  the wrong adapter trains                            test_complaint_14_only_the_wanted_adapter_trains
    15  adapter files empty, cut, or as large as the model  test_complaint_15_file_size
        ranks that differ in one batch are wrong at 32      test_complaint_extra_rank_32_beside_rank_1
        nothing works without further packages              test_complaint_extra_imports_without_other_libraries

Mistakes, by the file that has the test:

    this file
        alpha = rank in every test               test_toy_mistake_alpha_equal_to_rank
        alpha of no effect                       test_toy_mistake_alpha_ignored
    test_audit.py
        A expected to have a gradient at once    test_after_a_step_the_gradient_of_a_is_not_zero
    test_bitfit.py
        norms' biases left out                   test_norms_biases_train_and_norms_weights_do_not
        a name found anywhere in the text        test_names_are_whole_segments_not_texts_anywhere
        nothing to train in a Llama              test_a_model_without_biases_is_refused_by_name
        key biases thought to learn              test_the_key_bias_gets_no_gradient_through_softmax
    test_bottleneck.py
        the frozen norm once, not twice          test_toy_mistake_the_frozen_norm_is_applied_once
        dropout on the base's path               test_toy_mistake_dropout_on_the_base_path
        a start called the identity that is not  test_the_papers_starts_are_near_the_identity_and_say_so
    test_fusion.py
        a loaded AdapterFusion is not applied    test_complaint_54_and_74_a_loaded_fusion_is_applied
        1 / sqrt(D), the residual in the keys    test_a_block_is_the_formula_by_hand_and_so_are_all_gradients
        adding in place                          test_toy_mistake_adding_in_place
        V not the identity at first              test_the_start_is_adapterhubs
    test_ia3.py
        ends of texts for ends of paths          test_feedforward_names_are_whole_segments_also_to_peft
    test_increlora.py
        components orthogonal each by itself     test_orthogonality_is_over_all_components_together
        old components keep their scale          test_a_component_more_makes_all_others_smaller
    test_lora_embedding.py
        embeddings the wrong way round           test_embedding_starts_the_other_way_round
    test_lora_linear.py
        dropout on the base's path               test_dropout_leaves_the_base_path_alone
        half-precision adapters                  test_equals_peft_on_a_bfloat16_base_with_float32_adapters
    test_merge.py
        scale left out of the merge              test_merged_weight_is_the_exact_sum_rounded_once
        dropout while merging                    test_merging_without_dropout_even_in_training_mode
    test_mola.py
        the balance loss of pooled layers        test_penalty_is_the_sum_over_the_layers
        weights of the chosen do not sum to one  test_weights_of_the_chosen_sum_to_one
        padding balances the experts             test_balance_is_the_formula_over_real_tokens
        more chosen than there are               test_top_k_above_the_experts_of_some_layers_names_them
    test_prefix.py
        a prefix cannot start from real words    test_a_start_from_tokens_reads_a_text_behind_these_tokens
        zeros thought to change nothing          test_a_prefix_of_zeros_is_not_no_prefix
        order of keys and values, text at 0      test_computes_what_peft_computes
        no room said as an IndexError            test_no_room_for_prefix_and_text_is_said
        no cross-attention                       test_cross_attention_reads_its_prefix_as_a_formula_does
        its network cannot train on              test_saved_is_loaded_and_training_goes_on_as_if_nothing_had_been
    test_prompt.py
        a start of size 1                        test_random_vectors_are_as_large_as_embeddings_and_not_around_one
        a virtual token pooled for [CLS]         test_a_classifier_pools_cls_and_no_virtual_token
        half of an encoder-decoder's is dead     test_no_parameter_of_an_encoder_decoder_is_dead
    test_prompt_peft.py
        positions of RoBERTa                     test_outputs_and_gradients_are_peft_s
    test_prune_bitfit.py
        a dropped bias becomes 0                 test_best_vectors_are_kept_and_the_rest_is_pretrained_again
    test_qalora.py
        mean times the number of groups          test_the_mean_over_groups_is_another_convention
        plain LoRA merged and rounded again      test_merging_a_plain_lora_and_quantizing_again_is_not_exact
    test_qlora.py
        the whole weight kept for backward       test_training_keeps_no_numbers_of_a_weight
    test_quantize.py
        sixteen equal quantiles for NF4          test_sixteen_equal_quantiles_are_not_nf4
        low half byte first                      test_hand_computed_codes_and_bytes
"""

import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from contract_cases import CASES, KINDS, compute, loss_of, make_batch, make_model
from safetensors.torch import load_file, save_file
from torch import nn

from minillm.generation import generate_tokens
from minillm.layers import KVCache
from minillm.peft import (
    METHODS,
    AdapterConfig,
    BottleneckConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    QaLoraConfig,
    QLoraConfig,
    QuantizedLinear,
    activate,
    combine,
    load_adapter,
    merge,
    merge_errors,
    rows,
    save_adapter,
    tune,
    tunings_of,
    unmerge,
)

CONFIG = LoraConfig(rank=3, alpha=7.0, targets=("q_proj", "mlp.up_proj"))


def trained(model, name="new"):
    return tunings_of(model)[name].parameters()


def perturb(model, name="new", seed=7):
    """Move what an adapter trains off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model, name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tuned(config, kind="decoder"):
    """(the model, trained by `config` and in eval mode; its batch)"""
    model = make_model(kind)
    tune(model, config, "new")
    return perturb(model).eval(), make_batch(kind)


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def gradients(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------- complaints


def test_complaint_01_partly_wrong_targets(llama):
    """peft trains on with what did match, without a word (#1959); its error for none names no module (#1206)."""
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules=["q_proj", "v_prj"]))
    assert not [name for name, _ in theirs.named_parameters() if "v_prj" in name]
    before = tensors(llama)
    for wrong, guess in (("v_prj", "v_proj"), (r".*\.v_proj", "v_proj"), ("self_atn.q_proj", "q_proj")):
        with pytest.raises(ValueError) as error:
            tune(llama, LoraConfig(targets=("q_proj", wrong)))
        assert f"{wrong!r} matches no module; did you mean {guess}" in str(error.value)
        assert "model.layers.{0..1}.self_attn.v_proj" in str(error.value)
        assert_same(tensors(llama), before)


@pytest.mark.parametrize("name", METHODS)
def test_complaint_02_keys_that_do_not_fit(name, tmp_path):
    """peft's load_adapter takes such a file and says nothing (#1678, #1932): the adapter stays as it was drawn."""
    case, model = CASES[name], make_model("decoder")
    case.prepare(model)
    fresh = copy.deepcopy(model)
    tune(model, case.of("decoder"), "new")
    save_adapter(perturb(model), tmp_path / "adapter", "new")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(path)
    first = min(saved)
    save_file({key if key != first else f"{key}x": tensor for key, tensor in saved.items()}, path)
    own = tmp_path / "adapter" / "minillm.json"
    text = own.read_text()
    with pytest.raises(ValueError, match="damaged: its checksum"):
        load_adapter(fresh, tmp_path / "adapter", "new")
    own.write_text(re.sub(r'("weights_sha256": )"\w+"', r"\1null", text))  # a writer that keeps no checksum
    before = tensors(fresh)
    with pytest.raises(ValueError) as error:
        load_adapter(fresh, tmp_path / "adapter", "new")
    assert "missing: " in str(error.value) and "unexpected: " in str(error.value)
    assert_same(tensors(fresh), before)
    assert "new" not in tunings_of(fresh)


def test_complaint_03_merge_and_unmerge(llama, tokens):
    """In bfloat16 peft's unmerge leaves other weights than before (#1388, #1836); ours are kept, not recomputed.

    The merged weight is the exact sum rounded once: half a unit in the last place, at most 2^-8 of a bfloat16.
    """
    llama.bfloat16()
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"]))
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    before = layer.base_layer.weight.clone()
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    assert not torch.equal(layer.base_layer.weight, before)

    tune(llama, LoraConfig(rank=3, alpha=7.0, targets=("q_proj",)), "new")
    perturb(llama)
    ours, state, logits = llama.model.layers[0].self_attn.q_proj, tensors(llama), llama(tokens).logits
    exact = ours.base.weight.double() + 7 / 3 * (ours.lora_B.double() @ ours.lora_A.double())
    merge(llama, keep=True)
    torch.testing.assert_close(
        llama.model.layers[0].self_attn.q_proj.weight.double(), exact, rtol=1.001 * 2**-8, atol=1e-7
    )
    unmerge(llama)
    assert_same(tensors(llama), state)
    assert torch.equal(llama(tokens).logits, logits)


def test_complaint_04_merge_on_a_quantized_base():
    """What was trained is W4 + B A, and that is merged; W16 + B A, as others do, is another (unsloth-zoo #810)."""
    model, batch = tuned(QLoraConfig(rank=3, alpha=7.0, block=16))
    original = make_model("decoder").layers[0].self_attn.q_proj.weight.detach()
    errors = merge_errors(model.layers[0].self_attn.q_proj, original)
    assert 100 * errors["rounded"] < min(errors["original"], errors["requantized"])
    expected = compute(model, batch)
    merge(model)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    torch.testing.assert_close(compute(model, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_complaint_05_gradient_checkpointing(kind):
    """Elsewhere lora_B is all zeros after such a training (peft #137, #1142): no input of a block needs a gradient."""
    model, batch = tuned(CONFIG, kind)
    plain = gradients(model, batch)
    model.gradient_checkpointing = True
    again = gradients(model.train(), batch)
    assert plain.keys() == again.keys() == trained(model).keys()
    assert all(gradient.norm() > 0 for gradient in again.values())
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_complaint_06_prefix_and_cache():
    """peft's prefix lives in the cache of transformers, whose changes broke it (#869, #2449, #2821)."""
    model, batch = tuned(PrefixConfig(length=3))
    whole, cache = compute(model, batch), [KVCache() for _ in model.layers]
    steps = [model(batch["tokens"][:, t : t + 1], cache=cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    text = batch["tokens"]
    new = generate_tokens(model, text, max_new_tokens=4)
    for t in range(4):
        chosen = compute(model, batch | {"tokens": text})[:, -1].argmax(-1)
        assert torch.equal(chosen, new[:, t])
        text = torch.cat([text, chosen[:, None]], 1)
    plain = gradients(model, batch)
    model.gradient_checkpointing = True
    torch.testing.assert_close(gradients(model, batch), plain, rtol=0, atol=0)


def test_complaint_07_tied_embeddings(tied_decoder, tokens):
    """peft merges into a tied head with a warning, and the embedding has changed too (#2018, #2777)."""
    before, logits = tensors(tied_decoder), tied_decoder(tokens)
    for config in (
        LoraConfig(targets=("lm_head",)),
        LoraConfig(targets=("q_proj",), trainable=("lm_head",)),
        LoraConfig(targets=("embed_tokens",)),
    ):
        with pytest.raises(ValueError, match=r"tied with (embed_tokens|lm_head)\.weight, which would change too"):
            tune(tied_decoder, config)
    assert_same(tensors(tied_decoder), before)
    tied_decoder.lm_head.weight = nn.Parameter(tied_decoder.lm_head.weight.detach().clone())  # as the error says
    tune(tied_decoder, LoraConfig(rank=3, alpha=7.0, targets=("lm_head",)), "new")
    perturb(tied_decoder)
    merge(tied_decoder)
    assert torch.equal(tied_decoder.embed_tokens.weight, before["embed_tokens.weight"])
    assert not torch.allclose(tied_decoder(tokens), logits)


WITH_HEAD = [name for name in METHODS if issubclass(METHODS[name], AdapterConfig) and name != "pruned_bitfit"]


@pytest.mark.parametrize("name", WITH_HEAD)  # pruned biases may be the head's own
def test_complaint_08_head_after_reload(name, tmp_path):
    """A new classifier beside the adapter comes back as trained, not as drawn (peft #876, #577, #2336)."""
    case, model = CASES[name], make_model("encoder")
    case.prepare(model)
    fresh, batch = copy.deepcopy(model), make_batch("encoder")
    tune(model, dataclasses.replace(case.of("encoder"), trainable=("classifier",)), "new")
    perturb(model).eval()
    save_adapter(model, tmp_path / "adapter", "new")
    drawn = fresh.classifier.weight.clone()
    load_adapter(fresh, tmp_path / "adapter", "new")
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)
    assert not torch.equal(fresh.classifier.weight, drawn)
    # not bit for bit: IncreLoRA comes back as a LoRA, the product of its factors multiplied in another order
    torch.testing.assert_close(compute(fresh.eval(), batch), compute(model, batch), rtol=1e-5, atol=1e-5)


def test_complaint_09_left_padding_with_a_prompt():
    """peft puts the prompt before the padding (#1093, #54) and gives logits of the prompt as well."""
    model, batch = tuned(PromptConfig(length=5))
    expected, tokens = compute(model, batch), batch["tokens"]
    assert expected.shape[:2] == tokens.shape
    padded = torch.cat([torch.zeros_like(tokens[:, :4]), tokens], 1)
    mask = torch.arange(13).expand(2, 13) >= 4
    torch.testing.assert_close(model(padded, mask=mask)[:, 4:], expected, rtol=1e-4, atol=1e-4)
    new = generate_tokens(model, tokens, max_new_tokens=4)
    assert torch.equal(generate_tokens(model, padded, max_new_tokens=4, mask=mask), new)


def test_complaint_10_weighted_sum(decoder):
    """(w1 A1 + w2 A2)(w1 B1 + w2 B2) has terms of both adapters (peft #643, #3013); A and B side by side has none."""
    for seed, (name, config) in enumerate({"a": CONFIG, "b": LoraConfig(rank=3, alpha=2.0, rslora=True)}.items()):
        activate(decoder) if tunings_of(decoder) else None
        tune(decoder, config, name)
        perturb(decoder, name, seed)
    made = combine(decoder, {"a": 0.5, "b": -2.0}, "sum")
    assert made.how == "concat" and made.error < 1e-6
    layers = {name: dict(tuning.wrappers) for name, tuning in tunings_of(decoder).items()}
    for path in ("layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.2.mlp.up_proj"):
        scales = {"a": 0.5 * 7 / 3, "b": -2.0 * 2 / 3**0.5}
        parts = [s * layers[n][path].lora_B @ layers[n][path].lora_A for n, s in scales.items() if path in layers[n]]
        new = layers["sum"][path]
        torch.testing.assert_close(new.scale * new.lora_B @ new.lora_A, sum(parts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_complaint_11_bottleneck_adapters(kind, how):
    """Asked of peft since 2023 (#244, #2654). They start as the identity and train, in each kind of model."""
    model, batch = make_model(kind), make_batch(kind)
    expected = compute(model, batch)
    tune(model, BottleneckConfig(how, size=3), "new")
    assert torch.equal(compute(model, batch), expected)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    losses = []
    for _ in range(6):
        losses.append(loss_of(model, batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.99 * losses[0]


def test_complaint_12_merge_of_qalora():
    """The authors' merge never worked, since their zeros are packed whole numbers (#15, #22): ours are float."""
    model, batch = tuned(QaLoraConfig(rank=3, alpha=7.0, group=4))
    expected = compute(model, batch)
    codes = [m.codes.clone() for m in model.modules() if isinstance(m, QuantizedLinear)]
    zeros = [m.zero.clone() for m in model.modules() if isinstance(m, QuantizedLinear)]
    merge(model)
    merged = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(merged) == len(codes) > 0
    assert all(torch.equal(m.codes, old) for m, old in zip(merged, codes, strict=True))
    assert not any(torch.equal(m.zero, old) for m, old in zip(merged, zeros, strict=True))
    torch.testing.assert_close(compute(model, batch), expected, rtol=1e-5, atol=1e-5)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=4, n_positions=32)).eval()


@pytest.mark.parametrize("make, targets", [(gpt2, ("c_attn",)), (gpt2, ("all-linear",))])
def test_complaint_13_eval_never_merges(make, targets, tokens):
    """loralib merges in an eval() that is not always called (#34, #61, #103), and its fused layers merge wrongly (#21).

    Merging is a word of its own here; a mode changes no weight. GPT-2's fused, transposed layers merge like any other.
    """
    model = make()
    tune(model, LoraConfig(rank=3, alpha=7.0, targets=targets), "new")
    perturb(model)
    before, expected = tensors(model), model(tokens).logits
    for mode in (False, True, False):
        model.train(mode)
        assert_same(tensors(model), before)
    assert torch.equal(model.eval()(tokens).logits, expected)
    merge(model)
    for mode in (True, False):
        model.train(mode)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].keeps_base and name != "fusion"])
def test_complaint_14_only_the_wanted_adapter_trains(name):
    """After loading or switching peft has trained another adapter than the active one (#1374, #2759, #3580)."""
    model, batch = make_model("decoder"), make_batch("decoder")
    CASES[name].prepare(model)
    tune(model, CASES[name].of("decoder"), "first")
    perturb(model, "first")
    activate(model)
    assert not any(p.requires_grad for p in model.parameters())
    tune(model, LoraConfig(rank=2, alpha=5.0, targets=("o_proj",)), "second")
    for active in (("second",), ("first",), ("first", "second"), ("second", "first")):
        wanted, other = active[0], "first" if active[0] == "second" else "second"
        activate(model, *active, train=active[:1])
        assert not any(p.requires_grad for p in trained(model, other).values())
        model.zero_grad()
        trains = {id(p) for p in model.parameters() if p.requires_grad}
        assert trains == {id(p) for p in trained(model, wanted).values()}
        still = {n: p.detach().clone() for n, p in trained(model, other).items()}
        moved = {n: p.detach().clone() for n, p in trained(model, wanted).items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss_of(model, batch).backward()
        optimizer.step()
        assert_same(dict(trained(model, other)), still)
        assert any(not torch.equal(p, moved[n]) for n, p in trained(model, wanted).items())


def test_complaint_15_file_size(tmp_path):
    """443 bytes (peft #286, qlora #28) or nearly the whole model (#2898, #2092): the file has what trains."""
    model, _ = tuned(CONFIG)
    fresh, folder = make_model("decoder"), tmp_path / "adapter"
    save_adapter(model, folder, "new")
    path = folder / "adapter_model.safetensors"
    saved = load_file(path)
    assert sum(tensor.numel() for tensor in saved.values()) == 3 * 3 * ((16 + 16) + (16 + 20))
    assert path.stat().st_size < 4 * 3 * 3 * 68 + 150 * len(saved)  # and a line of header for each
    path.write_bytes(path.read_bytes()[:443])
    before = tensors(fresh)
    with pytest.raises(ValueError, match=r"is damaged, so nothing was loaded"):
        load_adapter(fresh, folder, "new")
    assert_same(tensors(fresh), before)
    assert not tunings_of(fresh)


def test_complaint_extra_rank_32_beside_rank_1():
    """LoRAX's kernel was wrong at rank 32 (PR #70): no rank is like the others in a batch here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(41, 40), nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 41))
    ranks = {"one": 1, "two": 2, "many": 32}
    for name, rank in ranks.items():
        activate(model) if tunings_of(model) else None
        tune(model, LoraConfig(rank=rank, alpha=7.0, targets=("1", "3")), name)
        perturb(model, name)
    activate(model)
    names, batch = ["many", None, "one", "two", "many"], torch.randint(0, 41, (5, 6))
    alone = []
    for i, name in enumerate(names):
        activate(model, *filter(None, [name]))
        alone.append(model(batch[i : i + 1]))
    activate(model)
    with rows(model, names):
        torch.testing.assert_close(model(batch), torch.cat(alone), rtol=1e-5, atol=1e-5)


WITHOUT = """
import sys
for name in ("transformers", "peft", "bitsandbytes", "accelerate", "datasets", "scipy", "matplotlib"):
    sys.modules[name] = None  # importing it fails
import torch
from torch import nn
import minillm.peft as library
for name in library.METHODS:
    library.METHODS[name]
for name in library.__all__:
    getattr(library, name)
model = nn.Sequential(nn.Linear(64, 64))
library.tune(model, library.QLoraConfig(rank=2, targets=("0",)))
model(torch.randn(1, 64)).sum().backward()
library.merge(model)
"""


def test_complaint_extra_imports_without_other_libraries():
    """S-LoRA does not import as it comes (#23). Here nothing but torch and safetensors is needed, 4 bits included."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- toy mistakes


def test_toy_mistake_alpha_equal_to_rank():
    """With alpha = rank the scale is 1, and a test does not see that it is left out (peft #2489)."""
    scales = {}
    for name, case in CASES.items():
        for kind in KINDS:
            config = case.of(kind)
            if hasattr(config, "alpha"):
                scales[config.name, kind] = config.alpha / config.rank
                assert scales[config.name, kind] != 1, (name, kind)
    assert {name for name, _ in scales} == {name for name in METHODS if hasattr(METHODS[name], "alpha")}


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(METHODS[name], "alpha")])
def test_toy_mistake_alpha_ignored(name):
    """Twice the alpha is twice the update of the adapted layers: where outputs are linear in it, it is seen exactly."""
    config, layers = CASES[name].of("decoder"), {}
    for factor in (1, 2):
        model = make_model("decoder")
        tune(model, dataclasses.replace(config, alpha=factor * config.alpha), "new")
        layers[factor] = dict(tunings_of(perturb(model).eval())["new"].wrappers)
    x = torch.randn(2, 5, 16)
    for path in [path for path in layers[1] if path.endswith("q_proj")]:
        updates = [layers[factor][path](x) - layers[factor][path].base(x) for factor in (1, 2)]
        assert updates[0].norm() > 1e-3
        torch.testing.assert_close(updates[1], 2 * updates[0], rtol=1e-3, atol=1e-5)


def test_toy_mistake_all_of_these_have_a_test():
    """The tables above name tests that exist, so that one renamed or dropped is noticed."""
    path, found = Path(__file__), []
    for line in __doc__.splitlines():
        if file := re.fullmatch(r"    (test_\w+\.py)", line):
            (path,) = Path(__file__).parents[1].rglob(file[1])
        elif name := re.fullmatch(r"    .* (test_\w+)", line):
            assert f"def {name[1]}(" in path.read_text(), (path, name[1])
            found.append(name[1])
    assert len(found) > 50
    numbers = [int(name[15:17]) for name in found if re.match(r"test_complaint_[01]\d_", name)]
    assert numbers == list(range(1, 16))
