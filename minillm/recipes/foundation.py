"""What a run of `minillm tune` builds on: the folder of a whole model, and adapters that stay as they are on it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from minillm.files import atomic_folder, write_json
from minillm.models import save_model, weights_fingerprint
from minillm.models.io import check_described
from minillm.peft import BottleneckConfig, CannotMerge, activate, merge, save_adapter, tunings_of
from minillm.peft.method import refuse
from minillm.peft.names import DEFAULT
from minillm.recipes.common import say
from minillm.recipes.locate import find_base, load, load_base, locate, relative_to
from minillm.recipes.under import adopt, describe_under, put_under, read_under
from minillm.tokenizers import load_tokenizer
from minillm.training.distributed import from_main

UNDER = "under"  # the folder in a run of the adapters that its own stands on


class Foundation(NamedTuple):
    """The folder of a model, and whether the adapters of the run's `base` stay on it."""

    folder: Path
    stacks: bool


def find_foundation(base: Path, run: Path, resume: bool, *, writes: bool) -> Foundation:
    """`base` itself; for an adapter `run/base`, where it is merged into its base, or the base of one that cannot be."""
    if locate(base).kind == "model":
        return Foundation(base, stacks=False)
    whole = run / "base"
    if resume:
        return Foundation(whole, stacks=False) if whole.is_dir() else Foundation(find_base(base), stacks=True)
    model, tokenizer, report, _ = load(base, writes=writes)
    try:
        merge(model)
        _check_whole(model)
    except CannotMerge as error:
        if whole.exists():  # a resumed run would take it for its base
            raise ValueError(f"{whole} is there already, of another run: delete it, or choose another run=") from None
        why = str(error).splitlines()[-1].strip()
        say(f"{base} ({report.method}) stays as it is, under the new adapter, in {run / UNDER}. No merging: {why}")
        return Foundation(find_base(base), stacks=True)
    with atomic_folder(whole) as folder:
        save_model(model, folder)
        tokenizer.save(folder)
    say(f"{base} ({report.method}) is merged into its base; the whole model is in {whole}")
    return Foundation(whole, stacks=False)


def _check_whole(merged: nn.Module) -> None:
    try:
        check_described(merged)
    except ValueError:
        raise CannotMerge("it has created biases, of which the config of a model says nothing") from None


def put_base(model: nn.Module, base: Path, run: Path, folder: Path, resume: bool, *, writes: bool) -> None:
    """Put the adapters of `base`, which could not be merged, on `model` (that of `folder`); a new run keeps them."""
    if resume:
        put_under(model, read_under(run / UNDER))
        return
    source = load(base, writes=writes).model
    names = {name: name for name in tunings_of(source)}
    if DEFAULT in names:
        names[DEFAULT] = next(name for i in range(1, len(names) + 2) if (name := f"base_{i}") not in names)
    try:
        adopt(source, model, names)
    except ValueError as error:
        raise ValueError(f"base={base} can neither be merged into its base nor stay under another: {error}") from None
    _keep(model, run, folder)


def load_bottlenecks(adapters: Iterable[tuple[str, str]], base: Path) -> dict[str, nn.Module]:
    """The models with these adapters (name, folder); ValueError lists what is no bottleneck on the model in `base`."""
    problems, models, fingerprint = [], {}, weights_fingerprint(load_base(base, writes=False).model)
    tokenizer = load_tokenizer(base).fingerprint
    for name, path in adapters:
        try:
            loaded = load(path, writes=False)
            if loaded.report is None:
                raise ValueError(f"{path} is a whole model; name a run of minillm tune method=bottleneck")
            problems += [f"{name}: {path} {flaw}" for flaw in _unfit(loaded.model)]
            own = find_base(locate(path).folder)
            if not own.samefile(base) and weights_fingerprint(load_base(own, writes=False).model) != fingerprint:
                problems.append(f"{name}: {path} was trained on a base with other weights, {own}")
            if loaded.tokenizer.fingerprint != tokenizer:
                problems.append(f"{name}: {path} was trained with another tokenizer")
            models[name] = loaded.model
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}".replace("\n", "\n  "))
    refuse(problems, f"adapters: these cannot be fused on {base}:")
    return models


def put_adapters(model: nn.Module, bottlenecks: Mapping[str, nn.Module], run: Path, folder: Path, resume: bool) -> None:
    """Put the adapters of these models on `model`, each on the base alone, all active; a new run keeps them."""
    if resume:
        put_under(model, read_under(run / UNDER))
        return
    for name, source in bottlenecks.items():
        adopt(source, model, {DEFAULT: name})
    activate(model, *bottlenecks)
    _keep(model, run, folder)


def _unfit(model: nn.Module) -> list[str]:
    """Why the adapters of a model cannot be one of those that are fused."""
    configs = [tuning.config for tuning in tunings_of(model).values()]
    if len(configs) > 1:
        return [
            f"stands on other adapters ({', '.join(config.name for config in configs[:-1])}), and those fused do not"
        ]
    return [
        f"is {config.name}, and bottleneck adapters are fused"
        for config in configs
        if config.name != BottleneckConfig.name
    ]


def _keep(model: nn.Module, run: Path, folder: Path) -> None:
    """Write the adapters of `model` to the run, which then needs the folders that they came from no more."""
    places = [run / UNDER / name for name in tunings_of(model)]

    def write() -> None:
        for place in places:
            save_adapter(model, place, place.name, base=relative_to(folder, place))
        for name, content in describe_under(run / UNDER, places).items():
            write_json(run / UNDER / name, content)

    from_main(write)
