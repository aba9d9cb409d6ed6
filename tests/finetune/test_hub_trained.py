"""Adapters trained here and by Hugging Face peft, on every kind of model, with padding and a cache: who reads whose.

`CASES` has every kind of model, `REFUSED` those of them where peft computes something else, each with our reason.
"""

import copy

import peft
import pytest
import torch

from minillm.finetune.hub_adapters import load_hf_adapter, save_hf_adapter
from minillm.generation import generate_tokens
from minillm.models.families.load import load_hf
from minillm.peft import METHODS, tune

P, T, VOCAB = 3, 9, 61
DIMS = dict(token_dim=24, num_layers=2, num_attention_heads=4)  # what peft cannot read from DistilBERT's config
CASES = {  # name -> (peft's task, what its config must be told, the head's names in ours and theirs)
    "gpt2": ("CAUSAL_LM", {}, ()),
    "llama": ("CAUSAL_LM", {}, ()),  # 4 heads, 2 key/value heads
    "qwen2": ("CAUSAL_LM", {}, ()),
    "phi3": ("CAUSAL_LM", {}, ()),
    "t5": ("SEQ_2_SEQ_LM", dict(num_layers=3), ()),
    "bart": ("SEQ_2_SEQ_LM", dict(num_layers=3), ()),
    "t5-even": ("SEQ_2_SEQ_LM", dict(num_layers=2), ()),
    "bart-even": ("SEQ_2_SEQ_LM", dict(num_layers=2), ()),
    "gpt2-body": ("FEATURE_EXTRACTION", {}, ()),
    "bert-body": ("FEATURE_EXTRACTION", {}, ()),  # with its pooler
    "distilbert": ("FEATURE_EXTRACTION", DIMS, ()),
    "t5-body": ("FEATURE_EXTRACTION", {}, ()),
    "mbart-body": ("FEATURE_EXTRACTION", {}, ()),
    "bert-masked-lm": ("FEATURE_EXTRACTION", {}, ()),
    "gpt2-classifier": ("SEQ_CLS", {}, ("classifier",)),
    "llama-classifier": ("SEQ_CLS", {}, ("classifier",)),
    "bert-classifier": ("SEQ_CLS", {}, ("classifier",)),
    "roberta-classifier": ("SEQ_CLS", {}, ("classifier", "pooler.dense")),
    "distilbert-classifier": ("SEQ_CLS", DIMS, ("classifier",)),
    "bart-classifier": ("SEQ_CLS", dict(num_layers=3), ("classifier",)),
    "t5-classifier": ("SEQ_CLS", dict(num_layers=3), ("classifier",)),
    "gpt2-tagger": ("TOKEN_CLS", {}, ("classifier",)),
    "bert-tagger": ("TOKEN_CLS", {}, ("classifier",)),
    "camembert-tagger": ("TOKEN_CLS", {}, ("classifier",)),
    "distilbert-tagger": ("TOKEN_CLS", DIMS, ("classifier",)),
    "llama-span": ("QUESTION_ANS", {}, ("outputs",)),
    "bert-span": ("QUESTION_ANS", {}, ("outputs",)),
    "roberta-span": ("QUESTION_ANS", {}, ("outputs",)),
    "bart-span": ("QUESTION_ANS", dict(num_layers=3), ("outputs",)),
}
POOLS = r"reads the state of its first virtual token in place of the text's first one, \[CLS\]"
SPANS = r"counts the places of an answer from its first virtual token"
EMBEDS = "heads on encoder-decoders take no embeddings"
LANGUAGE = "encoder-decoders take a prefix of peft only as language models"
CACHE = "its attention has no cache"
REFUSED = {  # (name, ours) -> the reason
    **{(name, "prompt"): POOLS for name in CASES if name in ("bert-body", "bert-classifier", "roberta-classifier")},
    ("distilbert-classifier", "prompt"): POOLS,
    **{(name, "prompt"): SPANS for name in ("llama-span", "bert-span", "roberta-span")},
    **{(name, "prompt"): EMBEDS for name in ("bart-classifier", "t5-classifier", "bart-span")},
    **{(name, "prefix"): LANGUAGE for name in ("t5-body", "mbart-body", "bart-classifier", "t5-classifier")},
    ("bart-span", "prefix"): LANGUAGE,
    **{(name, "prefix"): CACHE for name in ("distilbert", "distilbert-classifier", "distilbert-tagger")},
}
NETWORK = dict(encoder_hidden_size=10)
THEIRS = {  # peft's configs -> our method
    "prompt": (peft.PromptTuningConfig, {}, "prompt"),
    "p-mlp": (peft.PromptEncoderConfig, NETWORK | dict(encoder_reparameterization_type="MLP"), "prompt"),
    "p-lstm": (
        peft.PromptEncoderConfig,
        NETWORK | dict(encoder_reparameterization_type="LSTM"),
        "prompt",
    ),
    "prefix": (peft.PrefixTuningConfig, {}, "prefix"),
    "prefix-network": (peft.PrefixTuningConfig, dict(encoder_hidden_size=7, prefix_projection=True), "prefix"),
}
LAYERS = {  # by the first word of a model's name: query and value (as far as they are apart), (IA)3's targets
    "gpt2": (["c_attn"], ["c_attn", "mlp.c_proj"]),
    "llama": (["q_proj", "v_proj"], ["k_proj", "v_proj", "down_proj"]),
    "phi3": (["qkv_proj"], ["qkv_proj", "down_proj"]),
    "bert": (["query", "value"], ["key", "value", "output.dense"]),
    "roberta": (["query", "value"], ["key", "value", "output.dense"]),
    "distilbert": (["q_lin", "v_lin"], ["k_lin", "v_lin", "lin2"]),
    "t5": (["q", "v"], ["k", "v", "wo"]),
    "bart": (["q_proj", "v_proj"], ["k_proj", "v_proj", "fc2"]),
}
EMBEDDINGS = {"llama": "embed_tokens", "bert-classifier": "word_embeddings", "distilbert-tagger": "word_embeddings"}
ADAPTED = ("gpt2", "llama", "phi3", "t5-even", "bart", "gpt2-classifier", "bert-classifier", "roberta-classifier")
ADAPTED += ("distilbert-tagger", "llama-span", "roberta-span")
READABLE = [(name, kind) for name in CASES for kind in THEIRS if (name, THEIRS[kind][2]) not in REFUSED]
READABLE += [(name, kind) for name in ADAPTED for kind in ("lora", "ia3")]
WRITABLE = [(name, method) for name in CASES for method in ("prompt", "prefix") if (name, method) not in REFUSED]
# Whatever peft does, transformers' generate wants of T5 as many layers in the decoder as in the encoder
GENERATE = [name for name, (task, _, _) in CASES.items() if task.endswith("_LM") and name != "t5"]


def with_peft(base, name, kind):
    """peft around their model, trained for three steps of Adam."""
    task, dims, _ = CASES[name]
    if kind in THEIRS:
        cls, words, method = THEIRS[kind]
        if method == "prefix" and name.startswith("t5"):
            dims = dims | dict(token_dim=20)  # 4 heads of 5 features: peft would take d_model
        config = cls(task_type=task, num_virtual_tokens=P, **words, **dims)
    else:
        config = layered(name, kind, task)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return step(model.train(), trained, lambda: numbers(model(**batch(name)[1]))).eval()


def layered(name, kind, task):
    """LoRA with all that it has, or (IA)3."""
    attention, inner = LAYERS[name.partition("-")[0]]
    if kind == "ia3":
        return peft.IA3Config(task_type=task, target_modules=inner, feedforward_modules=inner[-1:])
    embeddings = [EMBEDDINGS[name]] if name in EMBEDDINGS else []
    ranks, alphas = {r"1\..*" + attention[0]: 3}, {attention[-1]: 5}
    words = dict(target_modules=attention + embeddings, use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    return peft.LoraConfig(task_type=task, r=2, lora_alpha=3, **words)


def trained_by_peft(base, name, kind):
    with torch.enable_grad():
        return with_peft(base, name, kind)


def step(model, parameters, answers):
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    for _ in range(3):
        out = answers()
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def numbers(out):
    if "start_logits" in out:
        return torch.stack([out["start_logits"], out["end_logits"]], dim=-1)
    return next(out[key] for key in ("logits", "pooler_output", "last_hidden_state") if out.get(key) is not None)


def batch(name, lengths=(T, T, T), side="right"):
    """(what ours takes, what theirs takes, whether each token is real): texts of these lengths, padded on a side."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, VOCAB, (len(lengths), max(lengths)), generator=generator)
    order = torch.arange(max(lengths)).expand_as(tokens)
    real = order < torch.tensor(lengths)[:, None]
    real = real if side == "right" else real.flip(1)
    tokens = tokens.masked_fill(~real, 1 if name.startswith(("roberta", "camembert", "bart", "mbart")) else 0)
    ours, theirs = {"tokens": tokens}, {"input_ids": tokens, "attention_mask": real.long()}
    if name.startswith(("t5", "bart", "mbart")) and not CASES[name][2]:  # heads read the text on both sides
        target = torch.randint(5, VOCAB, (len(lengths), 6), generator=generator)
        ours, theirs = {"source": tokens, "tokens": target}, theirs | {"decoder_input_ids": target}
    if name in ("bert-classifier", "bert-tagger"):  # with the other tasks peft drops them
        types = torch.randint(0, 2, tokens.shape, generator=generator)
        ours, theirs = ours | {"token_types": types}, theirs | {"token_type_ids": types}
    return ours | {"source_mask" if "source" in ours else "mask": real}, theirs, real


@torch.no_grad()
def agree(name, ours, theirs, prompt, close):
    """Ours answers as theirs: to full batches, to one text, and to padding on either side."""

    def compare(lengths, side):
        inputs, their_inputs, real = batch(name, lengths, side)
        mine, answer = ours(**inputs), numbers(theirs(**their_inputs))
        each = mine.dim() == 3 and "source" not in inputs  # an answer for each token
        answer = answer[:, -mine.shape[1] :] if each else answer  # peft answers at virtual tokens too
        return (mine[real], answer[real]) if each else (mine, answer)

    close(*compare((T, T, T), "right"))
    close(*compare((T,), "right"))
    if not (prompt and name in ("gpt2-classifier", "llama-classifier")):  # peft reads the last state, of padding
        close(*compare((T, 5, 1), "right"))
    # Padded on the left ours answer as to each text alone. What peft makes of it: see the tests of padding below.
    inputs, _, real = batch(name, (T, 5, 2), "left")
    for row, (where, length) in enumerate(zip(real, (T, 5, 2), strict=True)):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        key = "source" if "source" in inputs else "tokens"
        their_inputs = {"input_ids": alone[key][:, where], "attention_mask": torch.ones(1, length).long()}
        if "source" in inputs:
            their_inputs["decoder_input_ids"] = alone["tokens"]
        if "token_types" in inputs:
            their_inputs["token_type_ids"] = alone["token_types"][:, where]
        mine, answer = ours(**inputs)[row], numbers(theirs(**their_inputs))[0]
        each = mine.dim() == 2 and "source" not in inputs
        close(mine[where], answer[-length:]) if each else close(mine, answer)


@torch.no_grad()
def generates(name, ours, theirs, prompt):
    """Greedy tokens with a cache: of a batch that is padded on the left, or reads a source that is so on the right."""
    two = name.startswith(("t5", "bart"))
    inputs, their_inputs, real = batch(name, (T, 5), "right" if two else "left")
    if two:
        reader = ours.condition(inputs["source"], inputs["source_mask"])
        mine = generate_tokens(reader, torch.full((2, 1), ours.config.decoder_start_id), max_new_tokens=8)
        their_inputs.pop("decoder_input_ids")
    else:
        mine = generate_tokens(ours, inputs["tokens"], mask=inputs["mask"], max_new_tokens=8)
    options = dict(do_sample=False, eos_token_id=None, forced_bos_token_id=None, forced_eos_token_id=None)
    for row in (0, 1) if prompt else (slice(None),):  # peft's prompts and padding on the left: each text alone, below
        one = {key: v[row : row + 1, real[row]] if prompt else v for key, v in their_inputs.items()}
        answer = theirs.generate(**one, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options)[:, -8:]
        assert torch.equal(mine[row : row + 1] if prompt else mine, answer)


def around(base, folder):
    return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("name, kind", READABLE)
def test_what_peft_trained(name, kind, theirs, close, tmp_path):
    base, base_folder = theirs(name)
    before = numbers(copy.deepcopy(base)(**batch(name)[1]))
    model = with_peft(base, name, kind)
    model.save_pretrained(tmp_path / "theirs")
    prompt = kind in THEIRS and THEIRS[kind][2] == "prompt"
    ours = load_hf(base_folder)
    load_hf_adapter(ours, tmp_path / "theirs")
    agree(name, ours, model, prompt, close)
    answer = numbers(model(**batch(name)[1]))
    answer = answer[:, -before.shape[1] :] if before.dim() == 3 else answer
    assert (answer - before).abs().max() > 0.01 * before.abs().max()  # else equal says nothing
    save_hf_adapter(ours, tmp_path / "ours", base=str(base_folder))
    agree(name, ours, around(theirs(name)[0], tmp_path / "ours"), prompt, close)
    if name in GENERATE:
        generates(name, ours, model, prompt)


@pytest.mark.parametrize("name, method", WRITABLE)
def test_what_we_trained(name, method, theirs, close, tmp_path):
    base, base_folder = theirs(name)
    ours, (task, _, head) = load_hf(base_folder), CASES[name]
    parts = dict(parts=("decoder",)) if task == "SEQ_2_SEQ_LM" and method == "prefix" else {}
    tune(ours, METHODS[method](length=P, trainable=head, **parts))
    inputs = {key: value for key, value in batch(name)[0].items() if key != "mask"}
    step(ours, [p for p in ours.parameters() if p.requires_grad], lambda: ours(**inputs))
    save_hf_adapter(ours.eval(), tmp_path / "adapter", base=str(base_folder))
    model = around(base, tmp_path / "adapter")
    agree(name, ours, model, prompt := method == "prompt", close)
    if name in GENERATE:
        generates(name, ours, model, prompt)
    for record in (True, False):
        if not record:
            (tmp_path / "adapter" / "minillm.json").unlink()
        again = load_hf(base_folder)
        load_hf_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(**inputs), ours(**inputs))


@pytest.mark.parametrize("name, method", REFUSED)
def test_what_peft_computes_otherwise_is_not_written(name, method, theirs, tmp_path):
    ours = load_hf(theirs(name)[1])
    tune(ours, METHODS[method](length=P))
    with pytest.raises(ValueError, match=REFUSED[name, method]):
        save_hf_adapter(ours, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name, method", [(n, m) for n, m in REFUSED if CASES[n][0] != "FEATURE_EXTRACTION"])
def test_what_peft_computes_otherwise_is_not_read(name, method, theirs, tmp_path):
    """From a folder as peft writes it, where it can be made to."""
    base, base_folder = theirs(name)
    task, dims, _ = CASES[name]
    model = peft.get_peft_model(base, THEIRS[method][0](task_type=task, num_virtual_tokens=P, **dims))
    model.save_pretrained(tmp_path / "theirs")
    ours = load_hf(base_folder)
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=REFUSED[name, method]):
        load_hf_adapter(ours, tmp_path / "theirs")
    after = ours.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_s_prompts_do_not_bear_padding_on_the_left(name, theirs):
    """Why ours are compared with its answers to each text alone: the base and peft's prefixes answer equally there."""
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)

    def moves(model):
        _, padded, real = batch(name, (T, 4), "left")
        alone = {key: value[1:, real[1]] for key, value in padded.items()}
        return not torch.equal(model.generate(**padded, **options)[1:, -8:], model.generate(**alone, **options)[:, -8:])

    assert not moves(theirs(name)[0])
    assert not moves(trained_by_peft(theirs(name)[0], name, "prefix"))
    assert moves(trained_by_peft(theirs(name)[0], name, "prompt"))


@torch.no_grad()
def test_peft_reads_the_last_state_of_a_decoder_also_where_it_is_padding(theirs):
    """With a prompt transformers sees no token ids; it says so. The same texts padded on the right answer otherwise."""
    model = trained_by_peft(theirs("llama-classifier")[0], "llama-classifier", "prompt")
    _, padded, real = batch("llama-classifier", (T, 4))
    alone = {key: value[1:, real[1]] for key, value in padded.items()}
    full, short = model(**padded).logits, model(**alone).logits
    assert (full[1] - short[0]).abs().max() > 1e-2
    states = model.get_base_model().model  # the state of the last padding token is what the head read
    embeds = torch.cat([model.get_prompt(2), states.embed_tokens(padded["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, P), padded["attention_mask"]], dim=1)
    read = states(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, -1]
    torch.testing.assert_close(model.get_base_model().score(read), full)


@torch.no_grad()
def test_peft_counts_an_answer_from_its_prompt(theirs):
    """In training too: a start position of 2 is the last virtual token of three, not the text's third."""
    model = trained_by_peft(theirs("roberta-span")[0], "roberta-span", "prompt")
    inputs, place = batch("roberta-span")[1], torch.tensor([2, 2, 2])
    out = model(**inputs, start_positions=place, end_positions=place)
    assert out.start_logits.shape == (3, P + T)
    losses = [-logits.log_softmax(-1)[:, 2].mean() for logits in (out.start_logits, out.end_logits)]
    torch.testing.assert_close(out.loss, sum(losses) / 2)


@torch.no_grad()
@pytest.mark.parametrize("name, method", [(n, m) for n, m in REFUSED if REFUSED[n, m] in (EMBEDS, LANGUAGE)])
def test_peft_stops_there(name, method, theirs):
    task, dims, _ = CASES[name]
    dims = dims | dict(token_dim=20) if name.startswith("t5") else dims
    with pytest.raises((NotImplementedError, ValueError, RuntimeError, AttributeError, IndexError)):
        model = peft.get_peft_model(
            theirs(name)[0], THEIRS[method][0](task_type=task, num_virtual_tokens=P, **dims)
        ).eval()
        model(**batch(name)[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert-body", "bert-classifier", "roberta-classifier", "distilbert-classifier"])
def test_peft_pools_a_virtual_token(name, theirs):
    """What it answers does not change if the head reads that token, and does if it reads the text's first."""
    base, _ = theirs(name)
    model = trained_by_peft(base, name, "prompt")
    inputs = {key: value for key, value in batch(name)[1].items() if key in ("input_ids", "attention_mask")}
    answer, body = numbers(model(**inputs)), base.base_model
    embeds = torch.cat([model.get_prompt(3), body.get_input_embeddings()(inputs["input_ids"])], dim=1)
    states = body(inputs_embeds=embeds, attention_mask=torch.ones(3, P + T)).last_hidden_state

    def head(states):
        if name == "bert-body":
            return body.pooler(states)
        if name == "bert-classifier":
            return base.classifier(body.pooler(states))
        if name == "roberta-classifier":
            return base.classifier(states)
        return base.classifier(base.pre_classifier(states[:, 0]).relu())

    torch.testing.assert_close(head(states), answer)
    assert (head(states[:, P:]) - answer).abs().max() > 1e-2
