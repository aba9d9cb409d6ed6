"""QLoRA: LoRA on a base whose linear layers are kept in 4 bits.

Source: Dettmers et al. 2023 (arXiv:2305.14314): NormalFloat with double quantization, an adapter on every linear layer.
"""

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from minillm.ops.quantize import check_size, quantize_nf4
from minillm.peft.lora import LoraConfig
from minillm.peft.lora_linear import LoRALinear
from minillm.peft.method import Plan, refuse
from minillm.peft.names import inside
from minillm.peft.quantized_linear import ALREADY, QuantizedLinear, head, put_back, quantizable, replace_quantized
from minillm.peft.record import record_of
from minillm.peft.targets import ALL_LINEAR


@dataclasses.dataclass(frozen=True)
class QLoraConfig(LoraConfig):
    """LoRA whose base is quantized first: every linear layer that is no output head, whether it is a target or not.

    `block` weights share a scale; with `double_quantization` the scales are in 8 bits: 4.127 bits a weight, not 4.5.
    What is tied or in `trainable` keeps its numbers; so does transformers' Conv1D, which cannot be a target.
    The float weights are gone: `unload` gives the quantized base back, `merge` makes plain layers of the rounded
    weights plus the updates, which is what was trained; for the weights from before the base must be loaded again.
    The adapter's file is a plain LoRA's; with minillm.json beside it, it loads on the same float base, quantized anew.
    On a base that is quantized already (see `quantize`) this is LoraConfig.
    """

    name = "qlora"
    peft_type = "LORA"
    title = "Low-rank adapters on a 4-bit base"
    paper = "Dettmers et al. 2023, arXiv:2305.14314"
    start = "the base's weights are rounded to 4 bits"
    stacks = "any, if it comes first"
    changes_base = True

    targets: tuple[str, ...] = (ALL_LINEAR,)
    block: int = 64
    double_quantization: bool = True

    def _problems(self) -> list[str]:
        problems = super()._problems()
        try:
            check_size("block", self.block)
        except ValueError as error:
            problems.append(str(error))
        if type(self.double_quantization) is not bool:
            problems.append(f"double_quantization: True or False, not {self.double_quantization!r}")
        return problems

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        layers, others = self._layers(model, plan)
        problems = [f"{name}: {others[name]}" for name in plan.adapted if others.get(name, ALREADY) != ALREADY]
        if layers and record_of(model) is not None:
            problems.append("it has adapters, whose base would change; merge(model) or unload(model) them first")
        refuse(problems, f"QLoRA does not fit this {type(model).__name__}, which is unchanged:")
        return plan

    def install(self, model: nn.Module, plan: Plan) -> None:
        layers, _ = self._layers(model, plan)
        kept = partial(quantize_nf4, block=self.block, double=self.double_quantization)
        made = replace_quantized(model, layers, kept)
        try:
            super().install(model, plan)
        except BaseException:
            put_back(model, made)
            raise

    def _layers(self, model: nn.Module, plan: Plan) -> tuple[dict[str, nn.Linear], dict[str, str]]:
        """What is to be quantized by name, and what cannot be and why."""
        layers, others = quantizable(model)
        trains = {name for name in layers if inside(f"{name}.weight", plan.whole)}
        return {n: layer for n, layer in layers.items() if not head(n) and n not in trains}, others


def merge_errors(layer: LoRALinear, original: Tensor) -> dict[str, float]:
    """What three ways of merging a LoRA on a quantized layer lose: |W - W_trained| / |scale B A|, of Frobenius norms.

    "rounded": rounded weight + update in the layer's dtype, which is what was trained, and what `merge` does.
    "original": `original`, the weight from before quantization, + update: cleaner, but the update learnt to make good
    the rounding, which is no longer there. "requantized": the first, rounded to 4 bits again: small updates vanish.
    """
    if not isinstance(layer.base, QuantizedLinear) or original.shape != (layer.out_features, layer.in_features):
        wanted = f"a LoRALinear on a QuantizedLinear and its weight ({layer.out_features}, {layer.in_features})"
        raise ValueError(f"needed: {wanted}; given: {layer} and {tuple(original.shape)}")
    quantized, merged = layer.base.quantized, layer.weight.detach()
    update = layer.scale * (layer.lora_B.double() @ layer.lora_A.double()).detach()
    if not update.any():
        raise ValueError("the update is zero, so no error can be compared with it; train first")
    trained = quantized.dequantize(torch.float64) + update
    again = quantize_nf4(merged, block=quantized.block, double=quantized.absmax2 is not None)
    ways = {"rounded": merged, "original": original.double() + update, "requantized": again.dequantize(merged.dtype)}
    return {way: ((weight.double() - trained).norm() / update.norm()).item() for way, weight in ways.items()}
