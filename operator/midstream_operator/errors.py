"""The error tree of the operator, and how its names look in a status.

OperatorError
+-- Retryable   the same attempt may succeed later, or elsewhere
|   +-- NotLeader   this replica must not command now: it says nothing about what it was doing, and nothing is written
+-- Final       it will not, until somebody changes something; the message says what

Codes are snake_case, like the agents' (docs/errors.md lists both). In a status they are a condition's `reason`,
which the Kubernetes API wants in CamelCase: `reason_of`.
"""

from __future__ import annotations


class OperatorError(Exception):
    """`code` is stable and for programs, `message` tells a person what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Retryable(OperatorError):
    pass


class NotLeader(Retryable):
    def __init__(self) -> None:
        super().__init__("not_leader", "the Lease is not held at this moment: this replica, or another one, goes on")


class Final(OperatorError):
    pass


def reason_of(code: str) -> str:
    """`deadline_passed` -> `DeadlinePassed`: the code as a condition's reason."""
    return "".join(word[:1].upper() + word[1:] for word in code.split("_"))
