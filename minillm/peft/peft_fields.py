"""What types the fields of peft's adapter_config.json have, so that whoever reads them need not ask again."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any


def flaws(fields: Mapping[str, Any]) -> list[str]:
    """What has a type or a size that peft would not write, a line each."""
    wrong = []
    for names, fits, expected in _TYPES:
        wrong += [f"{n}={fields[n]!r}: expected {expected}" for n in names if n in fields and not fits(fields[n])]
    return wrong


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError, TypeError):
        return False
    return True


def _are_regexes(value: Any) -> bool:
    return _is_texts(value) and all(map(_is_regex, value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_probability(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_regex(key) and fits(value[key]) for key in value)


_TYPES = (
    (
        ("target_modules", "exclude_modules", "feedforward_modules"),
        _or_none(lambda value: _is_regex(value) if _is_text(value) else _is_texts(value)),
        "names, or a regular expression",
    ),
    (
        ("layers_pattern",),
        _or_none(lambda value: _is_regex(value) if _is_text(value) else _are_regexes(value)),
        "names, or regular expressions",
    ),
    (("modules_to_save",), _or_none(_is_texts), "a list of names"),
    (
        ("layers_to_transform",),
        _or_none(lambda value: all(type(i) is int for i in (value if isinstance(value, list) else [value]))),
        "numbers of layers",
    ),
    (
        ("task_type", "base_model_name_or_path", "revision", "peft_version", "bias"),
        _or_none(_is_text),
        "a text",
    ),
    (
        ("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "init_ia3_weights", "prefix_projection"),
        _or_none(_is_flag),
        "true or false",
    ),
    (("r", "num_virtual_tokens"), _is_count, "a whole number, at least 1"),
    (
        ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules", "encoder_hidden_size"),
        _or_none(_is_count),
        "a whole number, at least 1",
    ),
    (("lora_alpha",), _is_number, "a number above 0"),
    (("lora_dropout",), _is_probability, "a probability in [0, 1)"),
    (("rank_pattern",), _or_none(_pattern(_is_count)), "an object of ranks by regular expression"),
    (("alpha_pattern",), _or_none(_pattern(_is_number)), "an object of numbers by regular expression"),
)
