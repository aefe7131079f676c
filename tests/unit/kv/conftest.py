"""Fixtures of the KV tests."""

from gateway_pair import engines

__all__ = ["engines"]
