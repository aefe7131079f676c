"""An OpenAI-compatible front of the engine, which owns the clients' sockets and can hand them over."""
