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
