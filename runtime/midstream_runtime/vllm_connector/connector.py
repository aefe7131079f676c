"""What vLLM calls. The scheduler's half decides and owns the pool; the worker's half, which may be another process,
maps
it and copies.

A step, as vLLM runs it:

    scheduler   get_num_new_matched_tokens    how many blocks of a new request the pool has, behind vLLM's own hits
                update_state_after_alloc      pins them
                build_connector_meta          names the blocks to load before this step and those that it fills
    worker      start_load_kv                 pool -> vLLM's blocks
                (the model runs)
                wait_for_save                 filled blocks -> pool, before vLLM may use them for anything else
                build_connector_worker_meta   tells which are done
    scheduler   update_connector_output       unpins what was loaded; what was saved gets its checksum and index entry,
                                              in a thread of its own: no step waits for that

Blocks are named by midstream_runtime.contract.pool's chain over the token ids, whatever hash vLLM itself is started
with. A request whose KV depends on more than its ids (LoRA, images, embeddings, a cache salt) is neither saved nor
loaded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.logger import init_logger

from midstream_runtime.contract.pool import ROOT_HASH
from midstream_runtime.device import Mover, pin
from midstream_runtime.vllm_connector import geometry
from midstream_runtime.vllm_connector.share import PoolServer, map_pool
from midstream_runtime.vllm_connector.store import BlockStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = init_logger(__name__)


@dataclass(frozen=True)
class Load:
    slot: int
    """-1: gone since it was promised; the block must be computed."""
    block: int


@dataclass(frozen=True)
class Save:
    block: int
    slot: int
    parent: bytes
    ids: tuple[int, ...]


@dataclass
class Plan(KVConnectorMetadata):
    """One step's work, from the scheduler's half to the worker's."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class Done(KVConnectorWorkerMetadata):
    """What the worker's half has done in a step."""

    loaded: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    """Slots that were not filled: a block that this step computed from was missing."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, Done)
        return Done(self.loaded + other.loaded, self.saved + other.saved, self.dropped + other.dropped)


@dataclass
class Tracked:
    """A request that vLLM computes now."""

    request: Request
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    saved: int = 0
    """Its first blocks that are in the pool, or could not be put there."""


class MidstreamConnector(KVConnectorBase_V1):
    """Loaded by `--kv-transfer-config`; see the package."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        options = geometry.Options.of(vllm_config, vllm.__version__)
        self._path = options.pool_socket
        layout = self._layout = options.layout(vllm_config, kv_cache_config)
        self._size = layout.block_tokens
        if role is KVConnectorRole.SCHEDULER:
            self._store = BlockStore(layout)
            self._server = PoolServer(self._store, geometry.describe(vllm_config, layout), options.pool_socket)
            self._tracked: dict[str, Tracked] = {}
            self._promised: dict[str, tuple[int, list[bytes]]] = {}
            self._loads: list[Load] = []
            self._saving: dict[int, tuple[Save, Tracked, int]] = {}
            self._sealing: queue.SimpleQueue[Save] = queue.SimpleQueue()
            threading.Thread(target=self._seal, name="midstream-seal", daemon=True).start()
            log.info("Midstream: KV pool of %d slots, %d bytes each", layout.slots, layout.slot_bytes)
        else:
            self._names = list(kv_cache_config.kv_cache_groups[0].layer_names)
            self._views: list[torch.Tensor] = []
            self._moves: Mover | None = None
            self._failed: set[int] = set()
            self._done = Done()

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen costs a later hit, and no answer."""
        return False

    # -- scheduler's half ----------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not _plain(request):
            return 0, False
        # vLLM computes at least the last token itself.
        usable = (request.num_tokens - 1) // self._size
        hashes = self._store.chain(request.all_token_ids[: usable * self._size])
        first = num_computed_tokens // self._size
        found = self._store.hits(hashes[first:])
        if num_computed_tokens % self._size or found <= 0:
            return 0, False
        self._promised[request.request_id] = (first, hashes)
        return found * self._size, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        first, hashes = self._promised.pop(request.request_id, (0, []))
        if num_external_tokens == 0:
            return
        count = num_external_tokens // self._size
        slots = self._store.pin(hashes[first : first + count])
        slots += [-1] * (count - len(slots))
        targets = blocks.get_block_ids()[0][first : first + count]
        self._loads += [Load(slot, block) for slot, block in zip(slots, targets, strict=True)]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        for name in scheduler_output.finished_req_ids:
            self._tracked.pop(name, None)
        plan, self._loads = Plan(self._loads), []
        steps = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            if (tracked := self._tracked.get(new.req_id)) is not None:
                tracked.blocks = list(new.block_ids[0])
                self._save(tracked, new.num_computed_tokens + steps[new.req_id], plan)
        cached = scheduler_output.scheduled_cached_reqs
        for name, more, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if (tracked := self._tracked.get(name)) is None:
                continue
            if name in cached.resumed_req_ids:
                tracked.blocks = []
            tracked.blocks += more[0] if more else []
            self._save(tracked, computed + steps[name], plan)
        return plan

    def on_new_request(self, request: Request) -> None:
        if _plain(request):
            self._tracked[request.request_id] = Tracked(request)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed: every save is over when its step is."""
        self._tracked.pop(request.request_id, None)
        self._promised.pop(request.request_id, None)
        return False, None

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        done = connector_output.kv_connector_worker_meta
        if not isinstance(done, Done):
            return
        self._store.loaded(done.loaded)
        for slot in done.saved:
            self._sealing.put(self._saving.pop(slot)[0])
        for slot in done.dropped:
            _, tracked, at = self._saving.pop(slot)
            tracked.saved = min(tracked.saved, at)
        self._store.abandon(done.dropped)

    def _seal(self) -> None:
        while True:
            save = self._sealing.get()
            self._store.seal(save.slot, save.parent, save.ids)

    def _save(self, tracked: Tracked, computed: int, plan: Plan) -> None:
        """Blocks of a request that this step fills. A token that vLLM has not sampled yet (it schedules ahead) has no
        id: its block is saved a step later."""
        ids = tracked.request.all_token_ids
        full = min(computed, len(ids)) // self._size
        if full <= tracked.saved:
            return
        tracked.hashes = self._store.chain(ids[: full * self._size], tracked.hashes)
        for at in range(tracked.saved, full):
            slot = self._store.begin(tracked.hashes[at])
            if slot is None:
                continue
            parent = tracked.hashes[at - 1] if at else ROOT_HASH
            save = Save(tracked.blocks[at], slot, parent, tuple(ids[at * self._size : (at + 1) * self._size]))
            self._saving[slot] = (save, tracked, at)
            plan.saves.append(save)
        tracked.saved = full

    # -- worker's half -------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._views = geometry.layer_views(kv_caches, self._names, self._layout)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        loads = self._plan().loads
        for load in loads:
            if load.slot < 0:
                self._failed.add(load.block)
                continue
            # To the device in one piece; the layers' blocks are strided.
            first, size = self._views[0], self._layout
            whole = torch.empty(1, size.slot_elements, dtype=first.dtype, device=first.device)
            self._mover().load([load.slot], whole)
            shape = size.layers, 2, size.block_tokens, size.kv_heads, size.head_dim
            for view, saved in zip(self._views, whole.view(shape), strict=True):
                geometry.in_slot_order(view[load.block]).copy_(saved)
            self._done.loaded.append(load.slot)
        if loads:
            self._mover().wait()  # the scheduler's half lets go of the slots

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers were loaded before the model began."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are saved after the model's last layer."""

    def wait_for_save(self) -> None:
        saves = self._plan().saves
        if self._failed:
            # What the model computed this step may rest on a block that did not come; vLLM computes it again.
            self._done.dropped += [save.slot for save in saves]
            return
        for save in saves:
            layers = [geometry.in_slot_order(view[save.block]) for view in self._views]
            self._mover().save(torch.stack(layers).view(1, -1), [save.slot])
            self._done.saved.append(save.slot)
        if saves:
            self._mover().wait()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        done, self._done = self._done, Done()
        return done if done.loaded or done.saved or done.dropped else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Nothing is in flight: `wait_for_save` returns when vLLM's blocks have been read."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def _plan(self) -> Plan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan)
        return plan

    def _mover(self) -> Mover:
        """Over the pool. The scheduler's half is made after the worker's, so its pool is fetched when the first block
        moves."""
        if self._moves is None:
            slots = map_pool(self._path, self._layout).view(self._layout.slots, -1)
            device = self._views[0].device
            if device.type == "cuda":
                pin(slots)
            self._moves = Mover(slots, device)
        return self._moves


def _plain(request: Request) -> bool:
    """Does the request's KV follow from its token ids alone?"""
    extras: Sequence[Any] = (request.lora_request, request.mm_features, request.cache_salt)
    return not any(extras) and getattr(request, "prompt_embeds", None) is None and request.prompt_token_ids is not None
