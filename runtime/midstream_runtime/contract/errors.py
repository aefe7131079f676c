"""The error tree of everything in Midstream.

MidstreamError
+-- Retryable   the same request may succeed later, or elsewhere
+-- Final       it will not, until somebody changes something; the message says what
"""

from __future__ import annotations


class MidstreamError(Exception):
    """`code` is stable and for programs, `message` tells a person what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Retryable(MidstreamError):
    pass


class Final(MidstreamError):
    pass


def error_from(header: dict[str, object]) -> MidstreamError:
    """The error that a peer or pod described by code, message and retryable."""
    family = Retryable if header.get("retryable") else Final
    return family(str(header.get("code", "unnamed")), str(header.get("message", "")))
