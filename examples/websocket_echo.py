"""A WebSocket echo server whose connections can change nodes: the handoff library, without Midstream's gateway.

    python examples/websocket_echo.py 8000

RFC 6455 as far as an echo needs it: the handshake, text and binary messages, ping, close. A message that is half
received when the pod moves is finished at the target; that is all the state there is.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sys

from midstream_runtime.handoff import App, Connection, Handoff, Movable

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
CLOSE, PING, PONG = 0x8, 0x9, 0xA
MAX_MESSAGE_BYTES = 1 << 20


class Echo:
    """One client. `self.buffer` is what has come of the handshake, or of the frame that is not complete yet."""

    def __init__(self, connection: Connection, upgraded: bool = False, buffer: bytes = b"") -> None:
        self.connection = connection
        self.upgraded = upgraded
        self.buffer = bytearray(buffer)

    def received(self, data: bytes) -> None:
        self.buffer += data
        if not self.upgraded:
            self._shake_hands()
        while self.upgraded and self._take_frame():
            pass

    def eof(self) -> None:
        self.connection.close()

    def drained(self) -> None: ...

    def lost(self, error: OSError | None) -> None: ...

    def movable(self) -> Movable:
        return Movable()

    def save(self) -> bytes:
        return bytes([self.upgraded]) + bytes(self.buffer)

    def _shake_hands(self) -> None:
        head, end, rest = bytes(self.buffer).partition(b"\r\n\r\n")
        if not end:
            return
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        key = {k.lower(): v for k, v in fields.items()}.get(b"sec-websocket-key")
        if key is None:
            self.connection.write(b"HTTP/1.1 426 Upgrade Required\r\nupgrade: websocket\r\ncontent-length: 0\r\n\r\n")
            self.connection.close()
            return
        accept = base64.b64encode(hashlib.sha1(key.strip() + GUID).digest())
        self.connection.write(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
            b"sec-websocket-accept: " + accept + b"\r\n\r\n"
        )
        self.upgraded, self.buffer = True, bytearray(rest)

    def _take_frame(self) -> bool:
        """Answer the frame at the front of the buffer; False when it is not complete."""
        buffer = self.buffer
        if len(buffer) < 2:
            return False
        opcode, length, at = buffer[0] & 0x0F, buffer[1] & 0x7F, 2
        if length >= 126:
            wide = 2 if length == 126 else 8
            length, at = int.from_bytes(buffer[2 : 2 + wide], "big"), 2 + wide
        if length > MAX_MESSAGE_BYTES:
            self._send(CLOSE, (1009).to_bytes(2, "big"))
            self.connection.close()
            return False
        if len(buffer) < at + 4 + length:
            return False
        mask, masked = buffer[at : at + 4], buffer[at + 4 : at + 4 + length]
        payload = bytes(b ^ mask[i % 4] for i, b in enumerate(masked))
        final = buffer[0] & 0x80
        del buffer[: at + 4 + length]
        self._answer(opcode, payload, final)
        return opcode != CLOSE

    def _answer(self, opcode: int, payload: bytes, final: int) -> None:
        if opcode == PONG:
            return
        self._send(PONG if opcode == PING else opcode, payload, final)
        if opcode == CLOSE:
            self.connection.close()

    def _send(self, opcode: int, payload: bytes, final: int = 0x80) -> None:
        size = len(payload)
        if size < 126:
            head = bytes([final | opcode, size])
        elif size < 1 << 16:
            head = bytes([final | opcode, 126]) + size.to_bytes(2, "big")
        else:
            head = bytes([final | opcode, 127]) + size.to_bytes(8, "big")
        self.connection.write(head + payload)


class EchoApp(App):
    kind = "websocket-echo"

    def connected(self, connection: Connection) -> Echo:
        return Echo(connection)

    def restored(self, connection: Connection, state: bytes) -> Echo:
        return Echo(connection, bool(state[0]), state[1:])


async def main(port: int) -> None:
    handoff = Handoff(EchoApp())
    handoff.listen("::", port, path_mtu_bytes=1500)
    print("ready", flush=True)
    await handoff.serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
