"""The pod's end of the handoff, for any asyncio server: its connections can be moved to another node.

    class Echo(App):
        kind = "echo"
        def connected(self, connection): return EchoHandler(connection)
        def restored(self, connection, state): return EchoHandler(connection, state)

    handoff = Handoff(Echo())
    handoff.listen("::", 8000, path_mtu_bytes=9001)
    await handoff.serve()

Three parts: `Connection` owns a client's socket and its send buffer, and can be frozen between two bytes; `App` is
what a server implements; `Handoff` accepts, and answers the node's agent on a unix socket.
"""

from midstream_runtime.handoff.app import App, Handler, KvEntry, Movable, Paused
from midstream_runtime.handoff.connection import Connection
from midstream_runtime.handoff.server import Handoff

__all__ = ["App", "Connection", "Handler", "Handoff", "KvEntry", "Movable", "Paused"]
