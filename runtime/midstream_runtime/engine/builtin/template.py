"""The tiny model's chat template.

<|bos|> { <|system|>, <|user|> or <|assistant|>  text  <|end|> }...  <|assistant|>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from midstream_runtime.contract.errors import Final
from midstream_runtime.engine.builtin.tokenizer import Tokenizer

_ROLES = {"system": "<|system|>", "developer": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Prompt ids of a chat; content is a string or OpenAI's list of text parts."""
    if not messages:
        raise Final("bad_messages", "a chat needs at least one message")
    ids = [tokenizer.bos_id]
    for message in messages:
        role = message.get("role")
        if role not in _ROLES:
            raise Final("bad_messages", f"role {role!r} is not known to this model: use {', '.join(_ROLES)}")
        ids += [
            tokenizer.special_ids[_ROLES[role]],
            *tokenizer.encode(_text(message.get("content"))),
            tokenizer.eos_id,
        ]
    return [*ids, tokenizer.special_ids["<|assistant|>"]]


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise Final("bad_messages", "this model reads text only: content must be a string or text parts")
    return "".join(str(part.get("text", "")) for part in parts)
