"""OpenAI's completions and chat completions: request bodies in, response bodies out. No sockets, no engine.

A parameter that would change the answer and that we cannot honour is refused by its name; one that only describes
the caller (`user`, `metadata`, ...) is accepted. Beyond OpenAI's, vLLM's `top_k`, `ignore_eos` and
`repetition_penalty` are known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from midstream_runtime.engine.protocol import RequestStats, SamplingParams, TokenEvent
from midstream_runtime.gateway.http import HttpError, chunk

Kind = Literal["completion", "chat"]

DONE = b"data: [DONE]\n\n"
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, and vLLM's
MAX_STOPS = 16
_IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "priority",
}  # fmt: skip
"""About the caller, not about the answer."""
_FIXED: Mapping[str, tuple[Any, ...]] = {
    # Known, and only their neutral values can be honoured.
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "top_logprobs": (0,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "min_p": (0,), "min_tokens": (0,), "use_beam_search": (False,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, checked. `prompt` is text, ids, or a chat's messages."""

    kind: Kind
    model: str
    prompt: str | list[int] | list[dict[str, Any]]
    params: SamplingParams
    whole_context: bool
    """No limit was asked for: the answer may fill the context (`params.max_tokens` is not meant)."""
    stream: bool
    include_usage: bool


def parse(kind: Kind, body: bytes, served: str) -> Ask:
    """HttpError with OpenAI's status and the offending parameter's name."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is no JSON: {error}", code="bad_json") from error
    if not isinstance(data, dict):
        raise HttpError(400, "the body must be a JSON object", code="bad_json")
    fields = {name: value for name, value in data.items() if value is not None and name not in _IGNORED}
    reader = _Reader(fields)
    model = reader.text("model", served)
    if model != served:
        raise HttpError(404, f"there is no model {model!r} here: use {served!r}", code="model_not_found", param="model")
    prompt = _prompt(reader) if kind == "completion" else _messages(reader)
    stream = reader.flag("stream")
    options = reader.take("stream_options", dict, {})
    if options and not stream:
        raise reader.wrong("stream_options", "is for streams: set stream to true")
    include_usage = bool(options.get("include_usage"))
    params, whole_context = _params(reader, kind)
    reader.nothing_left()
    return Ask(kind, model, prompt, params, whole_context, stream, include_usage)


def _params(reader: _Reader, kind: Kind) -> tuple[SamplingParams, bool]:
    unset = tuple(name for name in ("temperature", "top_p", "top_k") if name not in reader.fields)
    limit = reader.integer("max_tokens", None, low=1)
    if kind == "chat":
        limit = reader.integer("max_completion_tokens", limit, low=1)
    stop = reader.fields.pop("stop", ())
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else None
    if stops is None or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise reader.wrong("stop", f"must be a string or up to {MAX_STOPS} strings, none of them empty")
    logprobs = (
        reader.flag("logprobs") if kind == "chat" else reader.integer("logprobs", None, low=0, high=0) is not None
    )
    params = SamplingParams(
        max_tokens=limit or DEFAULT_COMPLETION_TOKENS,
        temperature=reader.number("temperature", 1.0, 0, 2),
        top_p=reader.number("top_p", 1.0, 1e-9, 1),
        top_k=max(0, reader.integer("top_k", 0, low=-1) or 0),
        seed=reader.integer("seed", None, low=-(1 << 63), high=(1 << 63) - 1),
        stop=stops,
        ignore_eos=reader.flag("ignore_eos"),
        presence_penalty=reader.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=reader.number("frequency_penalty", 0.0, -2, 2),
        repetition_penalty=reader.number("repetition_penalty", None, 1e-3, 1e3),
        logprobs=logprobs,
        unset=unset,
    )
    return params, limit is None and kind == "chat"


def _prompt(reader: _Reader) -> str | list[int]:
    prompt = reader.fields.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
        return prompt
    raise reader.wrong("prompt", "must be one text or one list of token ids, and not empty")


def _messages(reader: _Reader) -> list[dict[str, Any]]:
    messages = reader.fields.pop("messages", None)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise reader.wrong("messages", "must be a list of at least one message object")
    return messages


class _Reader:
    """Takes parameters off a body one by one; what is left at the end is unknown."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def wrong(self, name: str, why: str) -> HttpError:
        return HttpError(400, f"{name} {why}", code="bad_parameter", param=name)

    def take(self, name: str, kind: type, default: Any) -> Any:
        value = self.fields.pop(name, default)
        if not isinstance(value, kind):
            raise self.wrong(name, f"must be a JSON {_JSON_NAMES[kind]}")
        return value

    def text(self, name: str, default: str) -> str:
        return str(self.take(name, str, default))

    def flag(self, name: str) -> bool:
        return bool(self.take(name, bool, False))

    def integer(self, name: str, default: int | None, low: int | None = None, high: int | None = None) -> int | None:
        value = self.fields.pop(name, default)
        if value is None:
            return None
        if type(value) is not int or (low is not None and value < low) or (high is not None and value > high):
            raise self.wrong(name, f"must be an integer{_range(low, high)}")
        return value

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        value = self.fields.pop(name, default)
        if value is default:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.wrong(name, f"must be a number{_range(low, high)}")
        return float(value)

    def nothing_left(self) -> None:
        for name, value in self.fields.items():
            if name not in _FIXED:
                raise self.wrong(name, "is not a parameter that this server knows")
            if value not in _FIXED[name]:
                allowed = " or ".join(json.dumps(v) for v in _FIXED[name])
                raise self.wrong(name, f"can only be {allowed} here")


_JSON_NAMES: Mapping[type, str] = {str: "string", bool: "true or false", dict: "object", list: "array"}


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" equal to {low}" if low == high else f" from {low:g} to {high:g}"
    return f" of at least {low}" if low is not None else ""


# -- responses ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Form:
    """Shape of one response; all of it travels, so that the target goes on in the same words."""

    kind: Kind
    id: str
    created: int
    model: str
    stream: bool
    include_usage: bool
    chunked: bool
    logprobs: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Form:
        return cls(**data)

    # Streams

    def opening(self) -> bytes:
        """A chat stream begins with the role."""
        if self.kind == "completion":
            return b""
        return self._event(self._choice({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}))

    def piece(self) -> Callable[[str], bytes]:
        """What makes a stream's event of a text. The words round it are made once: there are thousands a second."""
        marker = "\0"
        whole = self._event(self._choice(self._delta(marker, None, None)), raw=True)
        before, after = whole.split(json.dumps(marker).encode())
        dumps = json.JSONEncoder(ensure_ascii=False).encode
        if not self.chunked:
            return lambda text: b"%b%b%b" % (before, dumps(text).encode("utf-8", "replace"), after)
        fixed = len(before) + len(after)

        def make(text: str) -> bytes:
            middle = dumps(text).encode("utf-8", "replace")
            return b"%x\r\n%b%b%b\r\n" % (fixed + len(middle), before, middle, after)

        return make

    def event(self, event: TokenEvent) -> bytes:
        """An event that `piece` does not cover: the last one, or one with a logprob."""
        if self.kind == "chat" and event.finish_reason is not None and not event.text:
            return self._event(self._choice({"delta": {}, "finish_reason": event.finish_reason}))
        return self._event(self._choice(self._delta(event.text, event.logprob, event.finish_reason)))

    def closing(self, usage: RequestStats | None) -> bytes:
        """After the last event: usage where it was asked for, `[DONE]`."""
        last = b""
        if self.include_usage and usage is not None:
            last = self._event({**self._common(), "choices": [], "usage": _usage(usage)})
        return last + (chunk(DONE) if self.chunked else DONE)

    def failure(self, error: HttpError) -> bytes:
        return self._event(error.body())

    def _common(self) -> dict[str, Any]:
        name = {"completion": "text_completion", "chat": "chat.completion.chunk"}[self.kind]
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        data = {**self._common(), "choices": [{"index": 0, **choice}]}
        return {**data, "usage": None} if self.include_usage else data

    def _delta(self, text: str, logprob: float | None, reason: str | None) -> dict[str, Any]:
        detail = _logprobs(self.kind, [(text, logprob)]) if self.logprobs and logprob is not None else None
        words: dict[str, Any] = {"text": text} if self.kind == "completion" else {"delta": {"content": text}}
        return {**words, "logprobs": detail, "finish_reason": reason}

    def _event(self, data: dict[str, Any], raw: bool = False) -> bytes:
        body = b"data: %b\n\n" % json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        return chunk(body) if self.chunked and not raw else body

    # Whole

    def whole(self, pieces: list[tuple[str, float | None]], reason: str, usage: RequestStats | None) -> dict[str, Any]:
        text = "".join(piece for piece, _ in pieces)
        detail = _logprobs(self.kind, pieces) if self.logprobs else None
        choice: dict[str, Any] = {"index": 0, "logprobs": detail, "finish_reason": reason}
        if self.kind == "completion":
            name = "text_completion"
            choice["text"] = text
        else:
            name = "chat.completion"
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        data = {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": [choice]}
        return {**data, "usage": _usage(usage)} if usage is not None else data


def _usage(stats: RequestStats) -> dict[str, int]:
    prompt, completion = stats.prompt_tokens, stats.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprobs(kind: Kind, pieces: list[tuple[str, float | None]]) -> dict[str, Any]:
    """Of the chosen tokens only. A token's text is what it added to the answer: half a character adds nothing."""
    known = [(text, value) for text, value in pieces if value is not None]
    if kind == "chat":
        entries = [{"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []} for t, v in known]
        return {"content": entries, "refusal": None}
    offsets, at = [], 0
    for text, _ in known:
        offsets.append(at)
        at += len(text)
    tokens, values = [t for t, _ in known], [v for _, v in known]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
