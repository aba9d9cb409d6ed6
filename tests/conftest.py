"""What many tests share: small models, and their twins in Hugging Face transformers with the same weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an oracle that asks the network would fail differently on every machine
os.environ.setdefault("MINILLM_BACKEND", "torch")  # the same on every machine; tests of kernels ask for them by name

import pytest
import torch

from minillm.models import Decoder, ModelConfig, build
from minillm.ops import native

HF_NAMES = {  # ours -> LlamaForCausalLM
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native_library():
    """The native kernels, built now if they are not; skips where this machine has no compiler for them."""
    if reason := native.obstacle("cpu"):
        pytest.skip(f"no native kernels: {reason}")
    native.load_or_build()


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64)


@pytest.fixture
def tiny_decoder(tiny_config) -> Decoder:
    return build(tiny_config).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (3, 11))


@pytest.fixture
def hf_name():
    """`hf_name(name)` -> the name in LlamaForCausalLM of one of our decoder's parameters."""
    return _hf_name


@pytest.fixture
def llama_twin():
    """`llama_twin(model)` -> transformers' LlamaForCausalLM with the weights of our decoder, in eval mode."""
    return _llama_twin


@pytest.fixture
def llama_twins():
    """`llama_twins(dtype, **model_fields)` -> (our decoder, transformers' with the same weights), both in eval mode."""

    def make(dtype: torch.dtype = torch.float32, **fields) -> tuple[Decoder, torch.nn.Module]:
        fields = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "max_positions": 64} | fields
        ours = build(ModelConfig(**fields))
        with torch.no_grad():
            for parameter in ours.parameters():  # norms away from 1, matrices large enough to make attention sharp
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
        theirs = _llama_twin(ours).to(dtype)
        if dtype == torch.float64:
            _normalise_in_float64(theirs)
        return ours.to(dtype).eval(), theirs

    return make


def _hf_name(name: str) -> str:
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def _llama_twin(model: Decoder) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            attn_implementation="sdpa",
            pad_token_id=None,  # transformers gives a pad token no gradient
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    twin.load_state_dict({_hf_name(name): tensor for name, tensor in model.state_dict().items()}, strict=True)
    return twin.eval()


def _normalise_in_float64(model: torch.nn.Module) -> None:
    """transformers rounds to float32 inside LlamaRMSNorm whatever the model's dtype; torch's own RMSNorm does not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
