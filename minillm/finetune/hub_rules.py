"""What the words of peft's adapter_config.json mean: which modules they name, and which numbers hold for each.

Source: peft 0.21, tuners_utils.check_target_module_exists and utils/other.py. Paths are those of transformers' model.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

NUMBERED = r"(?:^|.*?\.){}\.(\d+)\."  # the first layer's number behind a module of that name

# What peft trains in full for a task, whatever the config says: every module whose path ends in one of these texts.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def targeted(fields: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The paths that `target_modules`, `exclude_modules` and `layers_to_transform` mean."""
    targets, excluded = fields.get("target_modules") or (), fields.get("exclude_modules") or ()
    found = [path for path in paths if _means(targets, path) and not _means(excluded, path)]
    layers = fields.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return found
    layers = [layers] if isinstance(layers, int) else layers
    named = set(targets)  # a full path is meant whatever its layer is
    return [path for path in found if path in named or _layer(path, fields.get("layers_pattern")) in layers]


def unmatched(fields: Mapping[str, Any], paths: Collection[str]) -> list[str]:
    """Those of `target_modules` that mean no path at all."""
    targets = fields.get("target_modules") or ()
    each = [(targets, targets)] if isinstance(targets, str) else [(target, [target]) for target in targets]
    return [target for target, alone in each if not any(_means(alone, path) for path in paths)]


def say_targets(wanted: Collection[str], paths: Iterable[str]) -> list[str] | str:
    """`target_modules` for exactly `wanted`: full paths, or a regular expression where another path ends in one."""
    listed = sorted(wanted)
    if all(path in wanted or not _means(listed, path) for path in paths):
        return listed
    return "|".join(map(re.escape, listed))


def feedforward(fields: Mapping[str, Any], path: str) -> bool:
    """Whether (IA)3 scales the input of the layer at `path`; peft compares the ends of texts."""
    inner = fields.get("feedforward_modules") or ()
    return re.fullmatch(inner, path) is not None if isinstance(inner, str) else path.endswith(tuple(inner))


def by_pattern(pattern: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says for a path: their keys are regular expressions for its end."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return otherwise


def say_pattern(values: Mapping[str, Any], usual: Any) -> tuple[Any, dict[str, Any]]:
    """The value for most paths (`usual`, if as good as any), and a pattern for the others."""
    counted = Counter(values.values()) or Counter([usual])
    most = usual if counted[usual] == max(counted.values()) else counted.most_common(1)[0][0]
    pattern = {path: value for path, value in values.items() if value != most}
    shadowed = {p: value for p, value in values.items() if by_pattern(pattern, p, most) != value}
    pattern |= shadowed  # paths that end like one of the others
    return most, dict(sorted(pattern.items(), key=lambda pair: (-len(pair[0]), pair)))


def taken(path: str, ends: Collection[str]) -> bool:
    """Whether `modules_to_save` means the module or one that it is inside of: peft compares the ends of texts."""
    parts = path.split(".")
    return any(".".join(parts[:i]).endswith(tuple(ends)) for i in range(1, len(parts) + 1))


def trains(fields: Mapping[str, Any], name: str, adapted: Collection[str]) -> bool:
    """Whether `bias` lets a parameter train beside the adapters of the modules `adapted`."""
    module, _, leaf = name.rpartition(".")
    which = fields.get("bias") or "none"
    return leaf == "bias" and (which == "all" or (which == "lora_only" and module in adapted))


def _means(targets: Any, path: str) -> bool:
    """A text is a regular expression for the whole path, a list has ends of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _layer(path: str, patterns: Any) -> int | None:
    names = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for name in names:
        if found := re.match(NUMBERED.format(name), path):
            return int(found[1])
    return None
