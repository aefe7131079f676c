"""The operator's logs: the agents' JSON, and no word of kopf's about each event that it has processed."""

from __future__ import annotations

import logging

from midstream_agent.contract import logs


def setup(level: int = logging.INFO) -> None:
    logs.setup(level)
    logging.getLogger("kopf").setLevel(logging.WARNING)  # what we do about an event we say ourselves
