"""What all parts of the operator share; made once in main.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from midstream_operator.agents import Agents
from midstream_operator.errors import NotLeader
from midstream_operator.events import Recorder
from midstream_operator.kube import Kube
from midstream_operator.lease import Lease
from midstream_operator.metrics import Metrics
from midstream_operator.providers.base import AddressProvider, NodeWitness
from midstream_operator.settings import Settings
from midstream_operator.view import View


@dataclass(slots=True)
class Context:
    settings: Settings
    kube: Kube
    view: View
    agents: Agents
    lease: Lease
    events: Recorder
    metrics: Metrics
    providers: Mapping[str, AddressProvider] = field(default_factory=dict)
    witness: NodeWitness | None = None

    def epoch(self) -> int:
        """For the next command chain; whoever does not lead must not command."""
        epochs = self.lease.epochs
        if epochs is None or not self.lease.held:
            raise NotLeader
        return epochs.next()
