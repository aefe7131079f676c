"""Engines compute tokens; the gateway talks to them through `protocol.Engine`."""
