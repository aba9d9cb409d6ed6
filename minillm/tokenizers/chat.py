"""Conversations as the input of an instruct model, by the template that came with its tokenizer.

The template's special tokens become ids; what people wrote never does. Before rendering, a private-use character is put
into each special name in the messages; after it, the text is cut at the names that are still whole.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.tokenizers.base import Tokenizer
from minillm.tokenizers.chat_sandbox import MARK, render

Message = Mapping[str, Any]


def render_chat(
    source: Tokenizer | str,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    template: str = "default",
    **variables: Any,
) -> str:
    """The conversation as text, for people to read; `encode_chat` gives the ids.

    source: a tokenizer with chat templates, of which `template` names one, or a Jinja template itself.
    messages: [{"role": "user", "content": "..."}, ...], and whatever else the template reads from them ("tool_calls").
    add_generation_prompt: end with what opens the assistant's turn. variables: for the template, such as tools=[...].
    """
    text, roles = _template_of(source, template)
    return render(text, {**roles, **_plain(messages, add_generation_prompt, variables)})


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    template: str = "default",
    **variables: Any,
) -> list[int]:
    """Ids of the conversation; arguments as in `render_chat`. A message that contains "<|im_end|>" is only text.

    Neither are added tokens that the template writes ("<tool_call>") found in messages, apart from the assistant's own.
    """
    text, roles = _template_of(tokenizer, template)
    specials = tokenizer.special_ids
    controls = {**specials, **{name: i for name, i in tokenizer.text_tokens.items() if name in text}}
    values = _plain(messages, add_generation_prompt, variables)
    if MARK in json.dumps(values, ensure_ascii=False):
        raise ValueError(f"the messages hold the private-use character {MARK!a}, which is used here; remove it")
    messages = [_marked(m, _pattern(specials if m["role"] == "assistant" else controls)) for m in values["messages"]]
    values = {**_marked(values, _pattern(controls)), "messages": messages}
    return encode_trusted(tokenizer, render(text, {**roles, **values}), controls)


def encode_trusted(tokenizer: Tokenizer, text: str, controls: Mapping[str, int] | None = None) -> list[int]:
    """Ids of text that code wrote, in which the names of special tokens become those tokens: "Paris is <mask>."

    controls: name -> id of these tokens, `tokenizer.special_ids` by default. Never pass text from outside.
    """
    controls = tokenizer.special_ids if controls is None else controls
    parts = re.split(f"({_pattern(controls)})(?!{MARK})", text)  # text, name, text, name, ..., text
    names_of = {i: name for name, i in controls.items()}
    ids: list[int] = []
    for at, part in enumerate(parts):
        if at % 2:
            ids.append(controls[part])
            continue
        if at and tokenizer.strips.get(parts[at - 1], (False, False))[1]:
            part = part.lstrip()
        if at + 1 < len(parts) and tokenizer.strips.get(parts[at + 1], (False, False))[0]:
            part = part.rstrip()
        part = part.replace(MARK, "")
        found = (tokenizer.encode_continuation(part) if at else tokenizer.encode(part)) if part else []
        # a control token among the ids of text is an added token that a person wrote: it is spelled
        unknown = tokenizer.unk_id
        ids += [j for i in found for j in (tokenizer.spell(names_of[i]) if i in names_of and i != unknown else (i,))]
    return ids


def _template_of(source: Tokenizer | str, name: str) -> tuple[str, dict[str, str]]:
    """The template's text, and the special tokens that it may name, such as bos_token."""
    if isinstance(source, str):
        return source, {}
    if name not in source.chat_templates:
        raise ValueError(
            f"{source!r} has no chat template {name!r}, but {sorted(source.chat_templates) or 'none at all'}. A base "
            'model has none: continue a text instead, or set tokenizer.chat_templates = {"default": "..."}'
        )
    return source.chat_templates[name], {f"{role}_token": token for role, token in source.roles.items()}


def _plain(messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, Any]) -> dict[str, Any]:
    """All that the template can see, as plain JSON values: an object with methods is not for strangers."""
    if isinstance(messages, str | Mapping) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages
    ):
        raise ValueError(f'messages is a list of {{"role": "user", "content": "..."}}, got {str(messages)[:200]}')
    values = {"tools": None, "documents": None, **variables, "add_generation_prompt": add_generation_prompt}
    plain = _json_copy("a message", [dict(message) for message in messages])
    return {**_json_copy("a variable of the template", values), "messages": plain}


def _json_copy(what: str, values: Any) -> Any:
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not made of strings, numbers, lists and dicts: {error}") from None


def _pattern(names: Mapping[str, int]) -> str:
    """A regular expression for any of the names, the longest first; for none at all, one that never matches."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"


def _marked(value: Any, pattern: str) -> Any:
    """`value` with the mark behind the first character of each match in its strings, so that no name is whole."""
    if isinstance(value, str):
        return re.sub(f"(?=(?:{pattern}))(.)", rf"\1{MARK}", value, flags=re.DOTALL)
    if isinstance(value, dict):
        return {_marked(key, pattern): _marked(item, pattern) for key, item in value.items()}
    return [_marked(item, pattern) for item in value] if isinstance(value, list) else value
