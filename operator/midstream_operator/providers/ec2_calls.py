"""Calls to EC2 from an event loop: in threads, paced, retried, and with errors by name.

EC2's mutating calls are token buckets of the whole account, shared with the VPC CNI. A client that retries a throttled
call at once makes it worse for everybody, so one pacer for each action hands out our share in order of arrival, and a
throttled answer empties it. boto3's own retries are off: they would sleep in our threads.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
)
from botocore.parsers import ResponseParserError

from midstream_operator.aws_settings import Ec2Settings
from midstream_operator.errors import Final, OperatorError, Retryable
from midstream_operator.plan_model import CallBudget

log = logging.getLogger(__name__)

THROTTLED = {"RequestLimitExceeded", "Throttling", "ThrottlingException", "RequestThrottled", "EC2ThrottledException"}
TRANSIENT = {"InternalError", "InternalFailure", "InternalServerError", "Unavailable", "ServiceUnavailable"}
NO_ANSWER = (HTTPClientError, ConnectionError, CredentialRetrievalError, ResponseParserError)
DENIED = {"UnauthorizedOperation", "AccessDenied", "AuthFailure", "ExpiredToken", "InvalidClientTokenId"}


class Ec2Refusal(Final):
    """EC2 said no to the request itself; `aws_code` is its own name for that."""

    def __init__(self, aws_code: str, message: str) -> None:
        super().__init__("ec2_refused", message)
        self.aws_code = aws_code


class Pacer:
    """A token bucket; who asks first is served first."""

    def __init__(self, burst: float, per_s: float) -> None:
        self.burst, self.per_s = burst, per_s
        self._level = burst
        self._at_s: float | None = None
        self.waiting = 0
        self._turn = asyncio.Lock()

    def level(self) -> float:
        now_s = asyncio.get_running_loop().time()
        if self._at_s is not None:
            self._level = min(self.burst, self._level + (now_s - self._at_s) * self.per_s)
        self._at_s = now_s
        return self._level

    async def take(self) -> None:
        self.waiting += 1
        try:
            async with self._turn:
                while self.level() < 1:  # noqa: ASYNC110 (time itself is what is waited for)
                    await asyncio.sleep((1 - self._level) / self.per_s)
                self._level -= 1
        finally:
            self.waiting -= 1

    def throttled(self) -> None:
        """The account's bucket is empty, whatever ours says."""
        self.level()
        self._level = 0.0


class Ec2Calls:
    """One boto3 client behind a pool of threads of its own."""

    def __init__(self, settings: Ec2Settings) -> None:
        self.settings = settings
        self.outcomes: Counter[tuple[str, str]] = Counter()  # (action, ok | AWS' code): a metric
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="ec2")
        self._client: Any = None
        self._making = asyncio.Lock()
        self._pacers: dict[str, Pacer] = {}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def budget(self, action: str) -> CallBudget:
        """What the planner may count on."""
        pacer = self._pacer(action)
        return CallBudget(max(0.0, pacer.level()), pacer.per_s, pacer.waiting)

    async def turn(self, action: str) -> None:
        """Wait for a call's turn before it is known what all it will say; then `mutate(has_turn=True)`."""
        await self._pacer(action).take()

    async def mutate(self, action: str, *, has_turn: bool = False, **parameters: Any) -> dict[str, Any]:
        """A call that changes something: paced, and retried while it may still succeed."""
        return await self._retried(action, self._pacer(action), parameters, has_turn)

    async def read(self, action: str, **parameters: Any) -> dict[str, Any]:
        return await self._retried(action, None, parameters)

    async def once(self, action: str, **parameters: Any) -> dict[str, Any]:
        """Without retries: for questions whose refusal is the answer."""
        return await self._attempt(action, parameters)

    async def pages(self, action: str, key: str, **parameters: Any) -> list[dict[str, Any]]:
        """All of a listing."""
        found: list[dict[str, Any]] = []
        token: str | None = None
        while True:
            more = {"NextToken": token} if token else {}
            answer = await self.read(action, MaxResults=1000, **parameters, **more)
            found += answer[key]
            token = answer.get("NextToken")
            if not token:
                return found

    def _pacer(self, action: str) -> Pacer:
        return self._pacers.setdefault(action, Pacer(self.settings.burst, self.settings.per_s))

    async def _retried(
        self, action: str, pacer: Pacer | None, parameters: dict[str, Any], has_turn: bool = False
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        give_up_at_s = loop.time() + self.settings.give_up_s
        pause_s = self.settings.retry_s
        while True:
            if pacer is not None and not has_turn:
                await pacer.take()
            has_turn = False
            try:
                return await self._attempt(action, parameters)
            except Retryable as e:
                if pacer is not None and e.code == "ec2_throttled":
                    pacer.throttled()
                wait_s = pause_s * random.uniform(0.5, 1.0)
                if loop.time() + wait_s > give_up_at_s:
                    raise
                log.warning("EC2 %s: %s; again in %.1f s", action, e, wait_s)
            await asyncio.sleep(wait_s)
            pause_s = min(self.settings.retry_max_s, pause_s * 2)

    async def _attempt(self, action: str, parameters: dict[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        outcome = "ok"
        try:
            call = getattr(await self._connected(), action)
            answer: dict[str, Any] = await loop.run_in_executor(self._pool, functools.partial(call, **parameters))
            return answer
        except (ClientError, BotoCoreError, ResponseParserError) as e:
            outcome = _aws_code(e)
            raise named(action, e) from e
        finally:
            self.outcomes[action, outcome] += 1

    async def _connected(self) -> Any:
        async with self._making:
            if self._client is None:
                loop = asyncio.get_running_loop()
                self._client = await loop.run_in_executor(
                    self._pool, functools.partial(make_client, "ec2", self.settings)
                )
            return self._client


def make_client(service: str, settings: Any, threads: int = 0) -> Any:
    """A boto3 client without retries of its own; `settings` has region, endpoint and timeouts."""
    config = Config(
        retries={"total_max_attempts": 1},
        connect_timeout=getattr(settings, "connect_s", 3.0),
        read_timeout=getattr(settings, "read_s", 30.0),
        max_pool_connections=threads or getattr(settings, "threads", 4),
    )
    session = boto3.session.Session()  # the default session is not safe to share among threads
    make: Callable[..., Any] = session.client
    region = settings.region or os.environ.get("AWS_REGION")  # IRSA's name for it; boto3 looks at AWS_DEFAULT_REGION
    return make(service, region_name=region, endpoint_url=settings.endpoint or None, config=config)


def _aws_code(e: Exception) -> str:
    return str(e.response["Error"]["Code"]) if isinstance(e, ClientError) else type(e).__name__


def named(action: str, e: Exception) -> OperatorError:
    """boto3's error as one of ours: what may pass by itself is Retryable."""
    code, api = _aws_code(e), "".join(word.capitalize() for word in action.split("_"))
    message = e.response["Error"].get("Message", "") if isinstance(e, ClientError) else str(e)
    if code in THROTTLED:
        return Retryable("ec2_throttled", f"EC2 throttles {api}: the account's calls are used up")
    if code in TRANSIENT or isinstance(e, NO_ANSWER):
        return Retryable("ec2_unavailable", f"EC2 did not answer {api}: {code}: {message}")
    if code in DENIED:
        return Final("ec2_denied", f"EC2 denies {api}: {message} See docs/iam.md for the policy that is needed")
    if isinstance(e, NoCredentialsError | NoRegionError):
        return Final("no_credentials", f"{message}: give the operator's service account a role (docs/iam.md)")
    return Ec2Refusal(code, f"EC2 refuses {api}: {code}: {message}")
