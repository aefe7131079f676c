"""A vLLM server that computes nothing: the next token is a function of all ids before it, so that every way of going on
can be told from a wrong one, and streams are as slow as a test wants.

Stands in for the real server (tests/vllm has it) where that is too slow to try many cases or cannot be made to fail at
a given point. As strict: it refuses fields that vLLM 0.32 does not know, prompts that are no ids, a limit below 1; its
streams have vLLM's shapes; an abort is a closed connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

KNOWN = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed",
    "ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "top_logprobs", "stream",
    "return_token_ids", "n", "tools", "response_format", "stop",
}  # fmt: skip
CONTEXT = 4096


@dataclass
class FakeVllm:
    """`async with FakeVllm() as server`: listens on a port of its own."""

    delay_s: float = 0.002
    drift: int = 0
    """Another number, other tokens: a server that does not repeat itself."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    aborted: int = 0
    other: list[tuple[str, str]] = field(default_factory=list)
    """Requests to paths without a model."""
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def __aenter__(self) -> FakeVllm:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Connections break in the middle of whatever they were at."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0)

    # -- HTTP ----------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = next(int(x[15:]) for x in head.lower().split("\r\n") if x.startswith("content-length:"))
            await self._answer(writer, method, path, await reader.readexactly(length))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone: vLLM aborts what it asked for
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> None:
        data = json.loads(body) if body else {}
        match method, path:
            case "GET", "/v1/models":
                card = {"id": "fake", "root": "/models/fake", "parent": None, "max_model_len": CONTEXT}
                self._reply(writer, 200, {"object": "list", "data": [card, {"id": "lora", "parent": "fake"}]})
            case "GET", "/metrics":
                lines = 'kv_cache_usage_perc{engine="0"} 0.25', "num_requests_running 3", "num_requests_waiting 2"
                self._reply(writer, 200, "".join(f"vllm:{line}\n" for line in lines))
            case "POST", "/tokenize":
                self._reply(writer, 200, {"tokens": list(json.dumps(data.get("messages") or data["prompt"]).encode())})
            case "POST", "/detokenize":
                self._reply(writer, 200, {"prompt": "".join(map(piece, data["tokens"]))})
            case "POST", "/v1/completions" | "/v1/chat/completions":
                await self._generate(writer, path, data)
            case _:
                self.other.append((method, path))
                self._reply(writer, 404 if path.startswith("/nowhere") else 200, {"path": path, "got": len(body)})

    def _reply(self, writer: asyncio.StreamWriter, status: int, data: Any) -> None:
        body = data.encode() if isinstance(data, str) else json.dumps(data).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nx-fake: yes"
        writer.write(head.encode() + b"\r\n\r\n" + body)

    def _refuse(self, writer: asyncio.StreamWriter, why: str) -> None:
        self._reply(writer, 400, {"error": {"message": why, "type": "BadRequestError", "code": 400}})

    # -- generation ----------------------------------------------------------------------------------------

    async def _generate(self, writer: asyncio.StreamWriter, path: str, data: dict[str, Any]) -> None:
        self.asked.append(data)
        if unknown := data.keys() - KNOWN:
            return self._refuse(writer, f"unknown fields {sorted(unknown)}")
        chat = path.endswith("chat/completions")
        prompt = list(json.dumps(data["messages"]).encode()) if chat else data["prompt"]
        limit = data.get("max_tokens", 16)
        if limit < 1 or not isinstance(prompt, list) or len(prompt) + limit > CONTEXT:
            return self._refuse(writer, f"max_tokens {limit} or the prompt cannot be served")
        salt = json.dumps([data.get(k) for k in ("temperature", "seed", "tools", "response_format")]) + str(self.drift)
        if data.get("temperature") and data.get("seed") is None:
            salt += str(len(self.asked))  # sampled: never the same twice
        choices = range(data.get("n") or 1)
        self.running += 1
        try:
            if data.get("stream"):
                await self._stream(writer, data, chat, prompt, limit, salt, list(choices))
            else:
                await asyncio.sleep(self.delay_s * limit)
                texts = ["".join(map(piece, tokens(prompt, limit, f"{salt}{i}"))) for i in choices]
                self._reply(writer, 200, {"id": "x", "choices": [{"index": i, "text": t} for i, t in enumerate(texts)]})
        finally:
            self.running -= 1

    async def _stream(
        self, writer: asyncio.StreamWriter, data: dict[str, Any], chat: bool, prompt: list[int], limit: int, salt: str,
        choices: list[int],
    ) -> None:  # fmt: skip
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        names = {"id": f"fake-{len(self.asked)}", "created": len(self.asked), "model": data["model"]}
        seed = {i: tokens(prompt, limit, f"{salt}{i}" if i or data.get("n") else salt) for i in choices}
        for at in range(limit):
            for i in choices:
                token = seed[i][at]
                reason = "length" if at == limit - 1 else None
                choice: dict[str, Any] = {"index": i, "finish_reason": reason}
                if chat:
                    choice["delta"] = delta(at, token, bool(data.get("tools")))
                else:
                    choice["text"] = piece(token)
                if data.get("return_token_ids"):
                    choice["token_ids"] = [token]
                if data.get("logprobs") is not None and not chat:
                    choice["logprobs"] = {"tokens": [piece(token)], "token_logprobs": [-token / 100]}
                self._event(writer, json.dumps({**names, "choices": [choice]}))
            await asyncio.sleep(self.delay_s)
            if writer.transport.is_closing():
                self.aborted += 1
                raise ConnectionResetError("aborted")
        self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def tokens(prompt: list[int], count: int, salt: str) -> list[int]:
    """The next ones follow from all ids before them, wherever the prompt ends."""
    ids = list(prompt)
    for _ in range(count):
        digest = hashlib.sha256(json.dumps(ids).encode() + salt.encode()).digest()
        ids.append(97 + digest[0] % 26)
    return ids[len(prompt) :]


def piece(token: int) -> str:
    return chr(token)


def delta(at: int, token: int, tools: bool) -> dict[str, Any]:
    """Of a chat: the role first, some reasoning, then text, or a tool call whose arguments are streamed."""
    if at == 0:
        return {"role": "assistant", "content": ""}
    if at < 5:
        return {"reasoning": piece(token)}
    if not tools:
        return {"content": piece(token)}
    call: dict[str, Any] = {"index": 0, "function": {"arguments": piece(token)}}
    if at == 5:
        call = {"index": 0, "id": f"call-{token}", "type": "function", "function": {"name": "look_up", "arguments": ""}}
    return {"tool_calls": [call]}
