"""A streamed answer that is generated a second time: what the client has already is compared and left out.

Works on the JSON of the events, whatever they stream: text, tool calls, reasoning, several choices, logprobs. An
event's `delta` adds to the message of its choice: strings are appended, lists with an `index` are joined by it,
others are extended. The message that a client has put together so far is the whole state; it travels.

    shown   what the client has           {"0": {"content": "Once up"}}
    again   what this generation has sent {"0": {"content": "Once"}}      still behind: the event is left out
                                          {"0": {"content": "Once upon"}} beyond: an event with "on" goes out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ReplayDiverged(Exception):
    """The second generation is another one."""


class Replay:
    """Of one response. Fed with all its events, here and elsewhere."""

    def __init__(self, shown: Mapping[str, Any] | None = None, common: Mapping[str, Any] | None = None) -> None:
        self.shown: dict[str, Any] = dict(shown or {})
        """By the choice's index: the message so far, and "finish" when it has ended."""
        self.common: dict[str, Any] = dict(common or {})
        """id and created of the response's first event."""
        self._again: dict[str, Any] = {}
        self._behind = bool(self.shown)

    def feed(self, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """The event as it goes out, or None; ReplayDiverged when it contradicts what was shown."""
        if not self.common:
            self.common = {name: event[name] for name in ("id", "created") if name in event}
        choices = [c for c in map(self._choice, event.get("choices", ())) if c is not None]
        if event.get("choices") and not choices:
            return None
        return {**event, **self.common, "choices": choices} if "choices" in event else dict(event)

    def _choice(self, choice: Mapping[str, Any]) -> dict[str, Any] | None:
        key = str(choice.get("index", 0))
        added = {name: choice[name] for name in ("delta", "text", "logprobs") if choice.get(name) is not None}
        if choice.get("finish_reason") is not None:
            added["finish"] = [choice["finish_reason"]]
        if not self._behind:
            self.shown[key] = joined(self.shown.get(key), added)
            return dict(choice)
        again = self._again[key] = joined(self._again.get(key), added)
        shown = self.shown.get(key, {})
        fresh = beyond(again, shown)
        if fresh is not None:
            self.shown[key] = again
        self._behind = any(beyond(self.shown[k], self._again.get(k, {})) is not None for k in self.shown)
        if fresh is None:
            return None
        kept = {k: v for k, v in choice.items() if k not in ("delta", "text", "logprobs", "finish_reason")}
        ended = fresh.pop("finish", None)
        empty: dict[str, Any] = {"delta": {}} if "delta" in choice else {"text": ""} if "text" in choice else {}
        return {**kept, **empty, **fresh, "finish_reason": ended[0] if ended else None}


def joined(whole: Any, added: Any) -> Any:
    """`added` appended to `whole`; neither is changed."""
    if whole is None or added is None:
        return added if whole is None else whole
    if isinstance(whole, str) and isinstance(added, str):
        return whole + added
    if isinstance(whole, dict) and isinstance(added, dict):
        return {**whole, **{k: joined(whole.get(k), v) for k, v in added.items()}}
    if isinstance(whole, list) and isinstance(added, list):
        return _joined_lists(whole, added)
    return added


def beyond(whole: Any, part: Any) -> Any:
    """What `whole` has more than `part`, in the shape of a delta; None when `part` has it all. ReplayDiverged when
    neither
    is the beginning of the other."""
    if whole is None or whole == part:
        return None
    if part is None:
        return whole
    if isinstance(whole, str) and isinstance(part, str):
        if whole[: len(part)] != part[: len(whole)]:
            raise ReplayDiverged(f"{whole[-40:]!r} after {part[-40:]!r}")
        return whole[len(part) :] or None
    if isinstance(whole, dict) and isinstance(part, dict):
        more = {k: beyond(v, part.get(k)) for k, v in whole.items()}
        return {k: v for k, v in more.items() if v is not None} or None
    if isinstance(whole, list) and isinstance(part, list):
        return _beyond_lists(whole, part)
    raise ReplayDiverged(f"{whole!r} instead of {part!r}")


def _indexed(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, dict) and "index" in item for item in items)


def _joined_lists(whole: list[Any], added: list[Any]) -> list[Any]:
    if not _indexed(added):
        return [*whole, *added]
    by_index = {item["index"]: item for item in whole}
    for item in added:
        rest = {k: v for k, v in item.items() if k != "index"}
        by_index[item["index"]] = {**joined(by_index.get(item["index"], {}), rest), "index": item["index"]}
    return list(by_index.values())


def _beyond_lists(whole: list[Any], part: list[Any]) -> list[Any] | None:
    if not _indexed(whole):
        common = min(len(whole), len(part))
        if whole[:common] != part[:common]:
            raise ReplayDiverged("a list of the second generation differs")
        return whole[common:] or None
    known = {item["index"]: item for item in part}
    more = []
    for item in whole:
        rest = beyond(item, known.get(item["index"]))
        if rest:
            more.append({**rest, "index": item["index"]})
    return more or None
