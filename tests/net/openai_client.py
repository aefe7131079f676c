"""The `openai` SDK as an application uses it; run in a namespace: `openai_client.py URL STREAMS TOKENS`.

Each of STREAMS tasks asks for a chat and a completion, streamed and whole, one after the other over the SDK's pool of
keep-alive connections. Nothing is retried: a connection that breaks is an exception. Prints the texts as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from openai import AsyncOpenAI

MODEL = "midstream-tiny"
EXTRA: dict[str, Any] = {"extra_body": {"ignore_eos": True}}


async def main(url: str, streams: int, tokens: int) -> None:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        texts = await asyncio.gather(*(one(client, i, tokens) for i in range(streams)))
    print(json.dumps(texts))


async def one(client: AsyncOpenAI, number: int, tokens: int) -> list[str]:
    prompt = f"Chapter {number}. It was"
    chat = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        **EXTRA,
    )
    streamed_chat = [c.choices[0].delta.content or "" async for c in chat]
    completion = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, **EXTRA
    )
    streamed = [c.choices[0].text async for c in completion]
    whole = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens, temperature=0, **EXTRA)
    assert whole.usage is not None and whole.usage.completion_tokens == tokens
    text = whole.choices[0].text
    assert text == "".join(streamed), "one prompt, two greedy answers"
    return ["".join(streamed_chat), text]


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
