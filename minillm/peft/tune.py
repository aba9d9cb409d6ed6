"""`tune` makes a model ready for training by one method; `unload` gives the base back."""

import dataclasses

from torch import nn

from minillm.peft.in_place import FullConfig, PartialConfig
from minillm.peft.lora import LoraConfig
from minillm.peft.merge import unmerge
from minillm.peft.method import Method, Plan, Tuning, forget, refuse, require_tuning, tuning_of
from minillm.peft.names import Wrapper, collapse, every_parameter, original_parameters
from minillm.peft.replace import replace_modules

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (LoraConfig, FullConfig, PartialConfig)}


@dataclasses.dataclass(frozen=True)
class Report:
    """What `tune` did: the modules it touched (original paths) and how many of the model's values train."""

    method: str
    modules: tuple[str, ...]
    trainable: int
    total: int  # the adapters' own values included

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        head = f"{self.method}: {self.trainable:,} of {self.total:,} values train ({self.percent:.2f} %)"
        return "\n  ".join([head, *collapse(self.modules)])


def tune(model: nn.Module, config: Method) -> Report:
    """Freeze `model`, insert what `config` asks for and let exactly that train. Load the base's weights before.

    Works in place on any module. Raises ValueError when the model is tuned already or the config does not fit it; after
    any error the model is what it was. At the start the model computes what it computed before.

    Example: `print(tune(model, LoraConfig(rank=8, alpha=16, targets=("q_proj", "v_proj"))))`
    """
    if (tuned := tuning_of(model)) is not None:
        refuse([f"{tuned.config}"], "this model is tuned already; merge(model) or unload(model) it first:")
    plan = config.plan(model)
    required_grad = {name: parameter.requires_grad for name, parameter in every_parameter(model)}
    model._tuning = Tuning(config, plan, required_grad)
    try:
        config.install(model, plan)
        for name, parameter in original_parameters(model).items():
            if parameter.requires_grad or name in plan.parameters:  # torch refuses to set even False on whole numbers
                parameter.requires_grad_(name in plan.parameters)
        parameters = original_parameters(model).values()
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        assert trainable == plan.count, f"{trainable} values train, the formula says {plan.count}"
    except BaseException:
        _take_out(model, plan)
        raise
    return Report(config.name, plan.adapted + plan.whole, trainable, sum(p.numel() for p in parameters))


def unload(model: nn.Module) -> None:
    """Drop the adapters: modules, weights and requires_grad are bit for bit those from before `tune`.

    Raises ValueError where the method trained weights of the base itself, which nobody kept: load the base again.
    """
    tuning = require_tuning(model, "unload")
    lost = [name for name in tuning.plan.parameters if name in tuning.required_grad]
    refuse(collapse(lost), f"{tuning.config.name} tuning trained the base's own weights; load the base again to undo:")
    if tuning.merged is not None:
        unmerge(model)
    _take_out(model, tuning.plan)


def _take_out(model: nn.Module, plan: Plan) -> None:
    """Put each adapted module's base in its place again, and let train what trained before."""
    replace_modules(
        model,
        lambda name, module: name in plan.adapted and isinstance(module, Wrapper),
        lambda name, module: module.base,
    )
    forget(model)
