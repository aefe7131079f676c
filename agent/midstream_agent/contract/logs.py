"""Logs as JSON, one object a line; `job` is the MigrationJob's uid, the same on both agents and in the operator."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

JOB: ContextVar[str] = ContextVar("job", default="")
"""The job that the running task works for."""


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if job := getattr(record, "job", "") or JOB.get():
            said["job"] = str(job)
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def setup(level: int = logging.INFO) -> None:
    """The root logger writes JSON to standard error, and nothing else does."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
