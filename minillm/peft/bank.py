"""A linear layer with many LoRA adapters at once: each row of the batch goes through its own, or through none."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from minillm.ops import lora_gather, lora_rows
from minillm.peft.lora import LoraConfig
from minillm.peft.lora_linear import LoRALinear
from minillm.peft.names import DEFAULT, Wrapper, collapse
from minillm.peft.record import Tuning


class LoRABank(Wrapper):
    """base(x), plus in row i of x the update of the adapter `names[i]`; none where that is None or not in this layer.

    `adapters`: by name, the LoRALinear that would stand here if it were active; its A and B are parameters of the bank
    too, so they train. A name stands for up to `repeats` rows one after the other, as a batch's size says.
    Without gradients the matrices of all rows are copied into one stack, once, and again only when they have changed.
    """

    def __init__(
        self, base: nn.Module, adapters: Mapping[str, LoRALinear], names: Sequence[str | None], repeats: int = 1
    ):
        super().__init__()
        self.base, self.names, self.repeats = base, tuple(names), repeats
        for name, layer in adapters.items():
            at = "" if name == DEFAULT else f"@{name}"  # the names they have in every tuned model
            self.register_parameter(f"lora_A{at}", layer.lora_A)
            self.register_parameter(f"lora_B{at}", layer.lora_B)
        known = list(adapters)
        which = [known.index(name) if name in adapters else -1 for name in names]
        device = next(iter(adapters.values())).lora_A.device
        self.register_buffer("rows", torch.tensor(which, device=device), persistent=False)
        scales = [layer.scale for layer in adapters.values()]
        self.register_buffer("scale", torch.tensor(scales, device=device, dtype=torch.float64), persistent=False)
        self.drops = tuple(layer.dropout.p for layer in adapters.values())
        self._copied: tuple[int, list[int], tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, each = self.base(x), self._each(x)
        if x.dim() == 3:
            return self._updated(y, x, each)
        flat_y, flat_x = (t.reshape(len(t), -1, t.shape[-1]) for t in (y, x))
        return self._updated(flat_y, flat_x, each).view(y.shape)

    def _updated(self, y: Tensor, x: Tensor, each: int) -> Tensor:
        if self.training and any(self.drops):
            x = self._drop(x, each)
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or compiling:
            a, b = self._stacks()
            if a.requires_grad and not compiling:
                a.register_hook(self._check_backward)
            return lora_gather(y, x, a, b, self.rows.repeat_interleave(each), self.scale.to(a.dtype))
        return lora_rows(y, x, *self._copies(each))

    def _stacks(self) -> tuple[Tensor, Tensor]:
        """The A (N, R, Din) and B (N, Dout, R) of all adapters, padded with zeros to the largest rank."""
        parameters = list(self._parameters.values())
        b = pad_sequence([b.mT for b in parameters[1::2]], batch_first=True)
        return pad_sequence(parameters[::2], batch_first=True), b.mT

    def _copies(self, each: int) -> tuple[Tensor, Tensor]:
        """Each row's own A, and B times its scale; zeros for a row without an adapter."""
        versions = [-1 if p.is_inference() else p._version for p in self._parameters.values()]
        if self._copied is None or self._copied[:2] != (each, versions) or -1 in versions:
            a, b = self._stacks()
            b = (self.scale.to(b.dtype)[:, None, None] * b).mT  # (N, R, Dout) in memory, as the product reads it
            rows = self.rows.repeat_interleave(each) + 1
            a, b = (pad(t, (0, 0, 0, 0, 1, 0)).index_select(0, rows) for t in (a, b))  # 0: zeros, for no adapter
            self._copied = each, versions, (a, b.mT)
        return self._copied[2]

    def _drop(self, x: Tensor, each: int) -> Tensor:
        """Dropout with the probability of each row's adapter."""
        p = torch.tensor([*self.drops, 0.0], device=x.device)[self.rows.repeat_interleave(each)][:, None, None]
        return torch.where(torch.rand(x.shape, device=x.device) < p, 0.0, x / (1 - p).to(x.dtype))

    def _each(self, x: Tensor) -> int:
        """How many rows of x each name stands for."""
        each, rest = divmod(len(x), len(self.names))
        if rest or not 1 <= each <= self.repeats:
            allowed = f", or up to {self.repeats} times as many" if self.repeats > 1 else ""
            raise ValueError(
                f"rows() names the adapters of {len(self.names)} rows, but a layer's input {tuple(x.shape)} has "
                f"{len(x)}: give a batch of {len(self.names)} rows{allowed}; where a search or a head makes several of "
                "each, such as beams or choices, say how many with rows(..., repeats=)"
            )
        return each

    def _check_backward(self, grad: Tensor) -> None:
        """Refuse a backward pass after the block: torch would drop the gradients of what trains no more."""
        if not all(parameter.requires_grad for parameter in self._parameters.values()):
            raise ValueError("backward() ran after rows() was left, where its adapters train no more: call it inside")

    def _apply(self, *args, **kwargs) -> nn.Module:
        self._copied = None  # it would stay on the old device
        return super()._apply(*args, **kwargs)

    @property
    def weight(self) -> Tensor:
        raise ValueError("inside rows() this layer has another weight for each row of the batch: call the layer")

    def extra_repr(self) -> str:
        return f"adapters={len(self.drops)}, rows={len(self.names)}"


def lora_layers(tunings: Mapping[str, Tuning], names: Iterable[str], problems: list[str]) -> dict[str, dict]:
    """Original path -> name of adapter -> its wrapper there; what is no LoRA adapter alone goes to `problems`."""
    layers: dict[str, dict[str, Wrapper]] = {}
    for name in names:
        tuning = tunings[name]
        if not isinstance(tuning.config, LoraConfig):
            problems.append(f"{name!r} is not LoRA but {tuning.config.title or tuning.config.name}")
            continue
        if tuning.slots:
            trained = ", ".join(collapse(slot.name for slot in tuning.slots))
            problems.append(f"{name!r} has trained more than LoRA, weights of the base itself: {trained}")
        for path, wrapper in tuning.wrappers:
            layers.setdefault(path, {})[name] = wrapper
    return layers
