"""The queue that EventBridge fills: one of our own (two consumers of one queue steal each other's messages).

A message is deleted when what it says is recorded, and never before: `handle` returns once the job is in the API
server. What cannot be recorded now comes again after the visibility timeout, also to the next process. What can never
be understood is counted, said, and deleted: it would come for ever. Several pollers, so that ten thousand foreign
messages do not delay the one that matters.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from midstream_operator.aws_settings import SqsSettings
from midstream_operator.notices.base import Handle, Notice
from midstream_operator.notices.eventbridge import SOURCE, Poison, parse
from midstream_operator.notices.health import Health
from midstream_operator.providers.ec2_calls import make_client
from midstream_operator.threads import in_daemon_thread

log = logging.getLogger(__name__)

NodeOf = Callable[[str], str]  # instance id -> the Node's name, empty: not of this cluster
SHOWN = 200  # characters of a poison message in the log


class SqsSource:
    name = SOURCE

    def __init__(self, settings: SqsSettings, node_of: NodeOf) -> None:
        self.settings = settings
        self.health = Health(SOURCE)
        self.outcomes: Counter[str] = Counter()  # messages: recorded, failed, foreign, poison, ignored. A metric
        self._node_of = node_of
        self._client: Any = None

    async def run(self, handle: Handle) -> None:
        self._client = await in_daemon_thread(make_client, "sqs", self.settings, self.settings.pollers * 2)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self.settings.pollers):
                    group.create_task(self._poll(handle), name=f"sqs-{number}")
        finally:
            self._client.close()

    async def _poll(self, handle: Handle) -> None:
        pause_s = self.settings.retry_s
        while True:
            try:
                messages = await self._receive()
                done = await asyncio.gather(*(self._settle(message, handle) for message in messages))
                await self._delete([message for message, over in zip(messages, done, strict=True) if over])
                self.health.well()
                pause_s = self.settings.retry_s
            except Exception as e:  # the queue is away, or boto3 broke: said, and tried again for ever
                self.health.ill(f"{type(e).__name__}: {e}")
                log.warning("SQS does not answer: %s; again in %.1f s", e, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(self.settings.retry_max_s, pause_s * 2)

    async def _receive(self) -> list[dict[str, Any]]:
        answer = await in_daemon_thread(
            self._client.receive_message,
            QueueUrl=self.settings.queue_url,
            MaxNumberOfMessages=self.settings.batch,
            WaitTimeSeconds=self.settings.long_poll_s,
            VisibilityTimeout=self.settings.visibility_s,
            MessageSystemAttributeNames=["SentTimestamp"],
        )
        return list(answer.get("Messages", []))

    async def _settle(self, message: dict[str, Any], handle: Handle) -> bool:
        """Whether the message may be deleted."""
        body = str(message.get("Body", ""))
        try:
            parsed = parse(body, self.settings)
        except Poison as e:
            log.error("message %s is deleted: %s: %.*s", message.get("MessageId"), e, SHOWN, body)
            return self._count("poison", True)
        self._age(message)
        known = [(notice, self._node_of(notice.instance_id)) for notice in parsed.notices]
        mine = [replace(notice, node=node) for notice, node in known if node]
        if not mine:
            foreign = bool(parsed.notices)
            return self._count("foreign" if foreign else "ignored", self.settings.delete_foreign or not foreign)
        return await self._record(mine, handle)

    async def _record(self, notices: Sequence[Notice], handle: Handle) -> bool:
        try:
            for notice in notices:
                await handle(notice)
        except Exception:
            log.exception("not recorded, it comes again: %s", [n.id for n in notices])
            return self._count("failed", False)
        return self._count("recorded", True)

    def _count(self, outcome: str, over: bool) -> bool:
        self.outcomes[outcome] += 1
        return over

    def _age(self, message: dict[str, Any]) -> None:
        """How long the message lay in the queue: the alert for a consumer that is too slow."""
        sent_ms = int((message.get("Attributes") or {}).get("SentTimestamp", 0))
        if sent_ms:
            self.health.queue_age_s = max(0.0, time.time() - sent_ms / 1000)

    async def _delete(self, messages: Sequence[dict[str, Any]]) -> None:
        """What could not be deleted comes again, and finds its job there."""
        if not messages:
            return
        entries = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(messages)]
        answer = await in_daemon_thread(
            self._client.delete_message_batch, QueueUrl=self.settings.queue_url, Entries=entries
        )
        for failed in answer.get("Failed", []):
            log.warning("a message was not deleted and comes again: %s", failed.get("Message", failed.get("Code")))
