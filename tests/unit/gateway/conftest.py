"""Fixtures of the gateway's tests."""

from gateway_pair import engines

__all__ = ["engines"]
