"""Why generation cannot start: every reason, so that one error can list them all."""

import inspect
from collections.abc import Collection

import torch
from torch import Tensor

from minillm.generation.next_logits import CausalModel
from minillm.peft.doors import positions_taken


def raise_if(wrong: list[str]) -> None:
    if wrong:
        raise ValueError("cannot generate:\n  " + "\n  ".join(wrong))


def check_causal(model: CausalModel) -> None:
    """Refuse what cannot be continued token by token: encoders and the heads on them."""
    hidden = getattr(model, "hidden", None)
    able = hidden is not None and getattr(model, "lm_head", None) is not None
    if not able or "cache" not in inspect.signature(hidden).parameters:
        raise ValueError(
            f"{type(model).__name__} cannot generate: that takes a decoder, a recurrent language model or an "
            "encoder-decoder, with a head over the vocabulary (lm_head)"
        )


def wrong_input(
    model: CausalModel, tokens: Tensor, max_new_tokens: int, stop_ids: Collection[int], mask: Tensor | None
) -> list[str]:
    """What is wrong with a prompt and the limits of its continuation, each with what to do about it."""
    check_causal(model)
    wrong = []
    vocab_size, length, trained = model.config.vocab_size, tokens.shape[-1], positions_taken(model)
    limit = model.config.max_positions - trained
    if max_new_tokens < 1:
        wrong.append(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if tokens.dim() != 2 or tokens.numel() == 0:
        wrong.append(f"tokens have shape {tuple(tokens.shape)}: need (batch, length) with at least one token in each")
    elif length + max_new_tokens > limit:
        wrong.append(
            f"prompt of {length} tokens + max_new_tokens={max_new_tokens} make {length + max_new_tokens}, more than "
            f"the model's max_positions={model.config.max_positions}"
            + (f" less the {trained} of its trained prompt" if trained else "")
            + f": {_make_it_fit(length, max_new_tokens, limit)}"
        )
    if outside := sorted({i for i in tokens.unique().tolist() if not 0 <= i < vocab_size}):
        wrong.append(
            f"token ids {outside[:10]} are outside the vocabulary 0..{vocab_size - 1}: use the model's tokenizer"
        )
    if outside := sorted(i for i in stop_ids if not 0 <= i < vocab_size):
        wrong.append(f"stop_ids {outside} are outside the vocabulary 0..{vocab_size - 1}, so they can never come")
    if mask is not None:
        wrong += _wrong_mask(tokens, mask)
    return wrong


def _make_it_fit(length: int, max_new_tokens: int, limit: int) -> str:
    """Each single change that is enough; both together only where neither is."""
    ways = [f"lower max_new_tokens to {limit - length}"] if length < limit else []
    ways += [f"shorten the prompt to {limit - max_new_tokens} (keep its end)"] if max_new_tokens < limit else []
    return ", or ".join(ways or ["shorten the prompt (keep its end) and lower max_new_tokens"])


def _wrong_mask(tokens: Tensor, mask: Tensor) -> list[str]:
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        return [f"mask is {mask.dtype} of shape {tuple(mask.shape)}: need torch.bool of shape {tuple(tokens.shape)}"]
    wrong = []
    if empty := (~mask.any(-1)).nonzero().flatten().tolist():
        wrong.append(f"prompts {empty} have no real token: the model needs one to start from")
    if (mask[:, 1:] < mask[:, :-1]).any():
        wrong.append("mask has padding after a real token: pad prompts on the left, so that they all end together")
    return wrong
