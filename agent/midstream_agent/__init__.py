"""Midstream's node agent: holds, checkpoints, ships and restores the streams of one node."""

__version__ = "0.1.0"
