"""Instance id -> node, by `spec.providerID`: asked for every message of the queue, foreign ones included."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from midstream_operator.view import Node

REBUILT_S = 1.0  # a flood of foreign messages must not walk through all nodes for each


@dataclass(slots=True)
class Instances:
    nodes: Mapping[str, Node]  # the view's own, by name
    clock: Callable[[], float] = time.monotonic
    _names: dict[str, str] = field(default_factory=dict)
    _built_at_s: float = float("-inf")

    def node_of(self, instance_id: str) -> str:
        """Empty: no node of this cluster. A node that is gone already is still known: its pods may not be."""
        if not instance_id:
            return ""
        if instance_id not in self._names and self.clock() - self._built_at_s >= REBUILT_S:
            self._built_at_s = self.clock()
            self._names |= {instance_of(node): node.name for node in self.nodes.values() if instance_of(node)}
        return self._names.get(instance_id, "")


def instance_of(node: Node) -> str:
    """aws:///eu-west-1a/i-0123 -> i-0123; empty for a node of another cloud."""
    head, _, tail = node.provider_id.rpartition("/")
    return tail if head.startswith("aws:") and tail.startswith("i-") else ""
