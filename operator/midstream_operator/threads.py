"""A blocking call in a thread that does not keep the process alive.

A long poll blocks for 20 s. The threads of an executor are joined when the interpreter ends, so that a pod would need
20 s to stop; a daemon thread is left behind.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_daemon_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[Any], None], value: Any) -> None:
        if not future.done():  # whoever asked may be gone
            settle(value)

    def body() -> None:
        try:
            result = call(*args, **kwargs)
        except BaseException as e:
            done = functools.partial(tell, future.set_exception, e)
        else:
            done = functools.partial(tell, future.set_result, result)
        if not loop.is_closed():
            loop.call_soon_threadsafe(done)

    threading.Thread(target=body, name=f"call-{getattr(call, '__name__', 'call')}", daemon=True).start()
    return await future
