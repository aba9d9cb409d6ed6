import copy
from typing import NamedTuple

import pytest
import torch
from contract_cases import CONFIGS

from minillm.models import Decoder


class Loss(NamedTuple):
    value: torch.Tensor


@pytest.fixture
def loss_fn():
    """Next-token loss on a batch of tokens, in the shape that training uses."""

    def next_token(model, tokens):
        logits = model(tokens)[:, :-1].flatten(0, 1)
        return Loss(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))

    return next_token


@pytest.fixture
def decoder():
    """A decoder of three layers with an untied head; all sizes differ, so that a swapped one shows."""
    torch.manual_seed(0)
    return Decoder(CONFIGS["decoder"])


@pytest.fixture
def tied_decoder(decoder):
    tied = copy.deepcopy(decoder)
    tied.lm_head.weight = tied.embed_tokens.weight
    return tied


@pytest.fixture
def llama():
    """A random LlamaForCausalLM of the Hub's library."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 41, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def perturb():
    """Move every trainable parameter off its start, as training would: B is no longer zero."""

    def move(model, seed=7):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.1 * noise.to(parameter.dtype))
        return model

    return move
