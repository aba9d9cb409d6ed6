"""How much of a loss reaches what a model knew some steps before: why gates and attention were invented."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.layers import State
from minillm.models.decoder import Decoder
from minillm.models.recurrent import RecurrentLM
from minillm.models.recurrent_seq2seq import RecurrentEncoderDecoder


def gradient_flow(model: nn.Module, tokens: Int[Tensor, "B T"], max_lag: int) -> Float[Tensor, "K1"]:
    """The norm of d loss_t / d h_{t-k} for k = 0 .. max_lag: its mean over the batch and over all t >= max_lag.

    So every lag is measured with the same losses. loss_t is the cross-entropy of one token, in nats; tokens are real
    everywhere. Dropout is off. What h_s is depends on the model:

    RecurrentLM               the h of all layers after token s, as handed to the next step and, the top layer's, to the
                              head. An LSTM's c is held fixed at step s, so its gradient has passed through the gates of
                              step s + 1 before it travels along c. loss_t: token t + 1.
    Decoder                   the embedding of token s; residual connections and attention reach it directly.
                              loss_t: token t + 1.
    RecurrentEncoderDecoder   the encoder's states at source token s, both directions. The source is `tokens`, and so is
                              the target: loss_t is that of saying token t again.

    For a linear one-layer RNN it is |(W^T)^k d loss_t / d h_t|: it shrinks or grows by the largest singular value of W
    per step at most (Pascanu et al. 2013, arXiv:1211.5063, section 2.1; Bengio et al. 1994).
    """
    measure = next((f for kind, f in MEASURED.items() if isinstance(model, kind)), None)
    if measure is None:
        known = ", ".join(kind.__name__ for kind in MEASURED)
        raise ValueError(f"gradient_flow does not know where {type(model).__name__} keeps its past; it knows {known}")
    training = model.training
    try:
        with torch.enable_grad():
            return _mean_norms(*measure(model.eval(), tokens), max_lag)
    finally:
        model.train(training)


def _mean_norms(losses: Tensor, states: list[Tensor], max_lag: int) -> Tensor:
    """losses (B, T); states: T tensors (B, ...), each reached by the losses from its own position on."""
    length = losses.shape[1]
    if not 0 <= max_lag < length:
        raise ValueError(f"max_lag={max_lag}: these tokens have {length} losses, so it must be in 0..{length - 1}")
    norms = []
    for t in range(max_lag, length):
        past = states[t - max_lag : t + 1][::-1]  # lag 0 first
        gradients = torch.autograd.grad(losses[:, t].sum(), past, retain_graph=True)  # no row's loss reads another row
        norms.append(torch.stack([gradient.flatten(1).norm(dim=1).mean() for gradient in gradients]))
    return torch.stack(norms).mean(0)


def _recurrent(model: RecurrentLM, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Step by step, so that each h is a tensor of its own, through which all later losses depend on it."""
    state, states, losses = None, [], []
    embeds = model.embed_tokens(tokens[:, :-1]).detach().requires_grad_()  # so that frozen models can be measured, too
    for t, x in enumerate(embeds.split(1, dim=1)):
        _, state = model.recurrent(x, state=state)
        states.append(state.h.transpose(0, 1))  # (B, L, D)
        state = State(states[-1].transpose(0, 1), state.c)
        losses.append(_losses(model, model.out_proj(state.h[-1]), tokens[:, t + 1]))
    return torch.stack(losses, dim=1), states


def _decoder(model: Decoder, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    states = list(model.embed_tokens(tokens[:, :-1]).detach().requires_grad_().unbind(1))
    hidden = model.hidden(embeds=torch.stack(states, dim=1))
    return _losses(model, hidden, tokens[:, 1:]), states


def _encoder_decoder(model: RecurrentEncoderDecoder, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    states = list(model.encode(tokens).detach().requires_grad_().unbind(1))
    inputs = F.pad(tokens[:, :-1], (1, 0), value=model.config.decoder_start_id)
    hidden = model.hidden(None, inputs, memory=torch.stack(states, dim=1))
    return _losses(model, hidden, tokens), states


def _losses(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.lm_head(hidden).flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


MEASURED = {RecurrentLM: _recurrent, RecurrentEncoderDecoder: _encoder_decoder, Decoder: _decoder}
