"""P-tuning: a prompt that a small network makes, so that its vectors train together instead of each for itself.

Source: Liu et al. 2021 (arXiv:2103.10385).
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minillm.config import nearest
from minillm.layers import Recurrent
from minillm.peft.method import Plan
from minillm.peft.prompt import PromptConfig, SoftPrompt, config_from_peft, embedding_std
from minillm.peft.prompt_gate import PromptGate
from minillm.peft.record import Tuning

ENCODERS = ("lstm", "mlp")


class PTuningGate(PromptGate):
    """As PromptGate, with what a network makes of `embeddings` in their place.

    mlp    `layers` times a linear layer and a ReLU, each position for itself, and a linear layer to D
    lstm   an LSTM that reads the prompt in both directions, `layers` deep, and an MLP of one hidden layer on it
    """

    def __init__(self, body: nn.Module, config: "PTuningConfig", device: torch.device | str):
        super().__init__(body, config.length, device)
        features = self.embeddings.shape[1]
        hidden, dropout = config.hidden_size or features, config.dropout
        with torch.device(device):
            if config.encoder == "lstm":
                self.lstm = Recurrent(features, hidden, config.layers, bidirectional=True, dropout=dropout)
                self.projection = _mlp([2 * hidden, 2 * hidden, features], dropout=0.0)
            else:
                self.lstm = None
                self.projection = _mlp([features, *[hidden] * config.layers, features], dropout)
        self.to(self.embeddings.dtype)

    def forward(self) -> Tensor:
        x = self.embeddings
        return self.projection(x if self.lstm is None else self.lstm(x[None])[0][0])


def _mlp(sizes: list[int], dropout: float) -> nn.Sequential:
    pairs = list(itertools.pairwise(sizes))
    inner = [layer for pair in pairs[:-1] for layer in (nn.Linear(*pair), nn.ReLU(), nn.Dropout(dropout))]
    return nn.Sequential(*inner, nn.Linear(*pairs[-1]))


@dataclasses.dataclass(frozen=True)
class PTuningConfig(SoftPrompt):
    """`length` vectors of D and the network (of `hidden_size`; None: D) that makes the prompt of them.

    All of it trains and is saved, so training can go on; `flatten` then leaves the vectors alone. The prompt starts as
    large as the model's embeddings are. `dropout` acts in the network: between LSTM layers, after the MLP's ReLUs.
    """

    name = "ptuning"
    peft_type = "P_TUNING"
    title = "P-tuning"
    hub_type = "PROMPT_TUNING"  # once it is flattened
    paper = "Liu et al. 2021, arXiv:2103.10385"
    formula = "P D + the prompt encoder's; mlp: (D + 1) F + (layers - 1) (F + 1) F + (F + 1) D"

    hidden_size: int | None = None
    encoder: Literal["lstm", "mlp"] = "lstm"
    layers: int = 2
    dropout: float = 0.0

    def _problems(self) -> list[str]:
        problems = super()._problems()
        sizes = {"layers": self.layers} | ({} if self.hidden_size is None else {"hidden_size": self.hidden_size})
        for field, value in sizes.items():
            if type(value) is not int or value < 1:
                problems.append(f"{field}: a whole number, at least 1, not {value!r}")
        if self.encoder not in ENCODERS:
            problems.append(f"encoder={self.encoder!r}: did you mean {nearest(str(self.encoder), ENCODERS)}?")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            problems.append(f"dropout: a probability in [0, 1), not {self.dropout!r}")
        elif self.encoder == "lstm" and self.layers == 1 and self.dropout:
            problems.append(f"dropout={self.dropout} acts between LSTM layers, and layers=1 leaves no between")
        return problems

    def gate(self, body: nn.Module, device: torch.device | str) -> PTuningGate:
        return PTuningGate(body, self, device)

    @torch.no_grad()
    def begin(self, gate: PTuningGate, body: nn.Module) -> None:
        nn.init.normal_(gate.embeddings)  # the network's inputs; what it makes of them is the prompt
        training, last = gate.training, gate.projection[-1]
        gate.eval()
        factor = embedding_std(body) * gate.scale / gate().std().clamp(min=1e-12)
        gate.train(training)
        last.weight *= factor
        last.bias *= factor

    def to_peft(self, plan: Plan) -> dict[str, Any]:
        """peft keeps the flat vectors only, so to this it should say that it cannot read it; see `flatten`."""
        return {"peft_type": "MINILLM_P_TUNING"}

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], model: nn.Module) -> PromptConfig:
        """A prompt to be tuned as such: peft has thrown the network away."""
        return config_from_peft(fields, model)

    def flatten(self, model: nn.Module, tuning: Tuning) -> None:
        """Becomes prompt tuning with the vectors that the network makes."""
        ((where, gate),) = tuning.gates
        config = PromptConfig(length=self.length, trainable=self.trainable)
        flat = PromptGate(model.get_submodule(where), config.length, gate.embeddings.device).train(gate.training)
        flat.adapter = gate.adapter
        gate.eval()
        flat.embeddings.copy_(gate())
        tuning.plan, tuning.config, tuning.gates = config.plan(model), config, [(where, flat)]
