"""Questions that come together are asked together: one call for all keys that are wanted within a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Together(Generic[T]):
    """`ask` gets sorted keys and answers those that there are; its failure is every asker's."""

    def __init__(self, name: str, wait_s: float, ask: Callable[[list[str]], Awaitable[Mapping[str, T]]]) -> None:
        self._name, self._wait_s, self._ask = name, wait_s, ask
        self._wanted: dict[str, asyncio.Future[T | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def get(self, key: str) -> T | None:
        future = self._wanted.get(key)
        if future is None:
            future = self._wanted[key] = asyncio.get_running_loop().create_future()
            if len(self._wanted) == 1:
                task = asyncio.create_task(self._soon(), name=self._name)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(future)

    async def _soon(self) -> None:
        await asyncio.sleep(self._wait_s)
        wanted, self._wanted = self._wanted, {}
        try:
            known = await self._ask(sorted(wanted))
        except Exception as e:
            for future in wanted.values():
                future.set_exception(e)
                future.exception()  # whoever asked may be gone
        except BaseException:
            for future in wanted.values():
                future.cancel()
            raise
        else:
            for key, future in wanted.items():
                future.set_result(known.get(key))
