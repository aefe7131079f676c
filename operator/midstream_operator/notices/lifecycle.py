"""Lifecycle actions of autoscaling groups: held while streams are still on the instance, completed when they are off.

The group waits for the completion, and no longer than its own timeout: a heartbeat starts that anew. What is completed
too early kills streams; what is never completed costs the timeout. So: complete when nothing is left to move, heartbeat
while something is, and say so when neither works. An action that the group has given up meanwhile is no error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from midstream_operator.aws_settings import SqsSettings
from midstream_operator.notices.base import Notice
from midstream_operator.providers.ec2_calls import make_client
from midstream_operator.threads import in_daemon_thread

log = logging.getLogger(__name__)

IsOff = Callable[[Notice], bool]  # no stream is left on the instance, and no job runs


@dataclass(slots=True)
class LifecycleActions:
    settings: SqsSettings
    is_off: IsOff
    poll_s: float = 1.0
    held: dict[str, Notice] = field(default_factory=dict)  # token -> its notice
    errors: dict[str, str] = field(default_factory=dict)  # token -> what AWS said last
    _client: Any = None

    def hold(self, notice: Notice) -> None:
        if token := notice.details.get("token"):
            self.held.setdefault(token, notice)

    async def run(self) -> None:
        """Until cancelled. What is held is known by the queue's message alone: SQS tells it again after a restart,
        since the message is deleted when the action is recorded, or the group's own timeout ends it."""
        loop = asyncio.get_running_loop()
        beat_at_s: dict[str, float] = {}
        while True:
            for token, notice in list(self.held.items()):
                if self.is_off(notice):
                    await self._call("complete_lifecycle_action", notice, LifecycleActionResult="CONTINUE")
                elif loop.time() >= beat_at_s.get(token, 0.0):
                    await self._call("record_lifecycle_action_heartbeat", notice)
                    beat_at_s[token] = loop.time() + self.settings.heartbeat_s
            await asyncio.sleep(self.poll_s)

    async def _call(self, action: str, notice: Notice, **more: str) -> None:
        token = notice.details["token"]
        try:
            if self._client is None:
                self._client = await in_daemon_thread(make_client, "autoscaling", self.settings, 4)
            await in_daemon_thread(
                getattr(self._client, action),
                AutoScalingGroupName=notice.details["group"],
                LifecycleHookName=notice.details["hook"],
                LifecycleActionToken=token,
                InstanceId=notice.instance_id,
                **more,
            )
        except (ClientError, BotoCoreError) as e:
            self._failed(action, token, e)
            return
        self.errors.pop(token, None)
        if action == "complete_lifecycle_action":
            log.info("lifecycle action of %s is complete: its streams are off", notice.instance_id)
            self.held.pop(token, None)

    def _failed(self, action: str, token: str, e: Exception) -> None:
        code = e.response["Error"]["Code"] if isinstance(e, ClientError) else type(e).__name__
        if code == "ValidationError":  # the group has given it up: "No active Lifecycle Action found with token"
            log.warning("%s: %s", action, e)
            self.held.pop(token, None)
            self.errors.pop(token, None)
        elif token not in self.errors:
            log.error("%s: %s; again in %.0f s", action, e, self.poll_s)
            self.errors[token] = str(e)
