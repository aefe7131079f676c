"""A process that owns, or carries, thousands of sockets needs as many descriptors."""

from __future__ import annotations

import resource


def allow_all() -> int:
    """Raise the soft limit of open files to the hard one, which needs no privilege; returns it.

    The soft one is 1,024 in most places, for the sake of programs that use select(2) (systemd's "File Descriptor
    Limits"); nothing here does.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
