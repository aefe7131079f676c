"""vLLM's KV cache in the pod's pool: a connector through vLLM's public KVConnectorBase_V1, and nothing patched.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "MidstreamConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "midstream_runtime.vllm_connector", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"pool_slots": 4096, "pool_socket": "/run/midstream/pool.sock"}}'

Imported by vLLM's own Python; the rest of the runtime never imports this package.

    connector.py   what vLLM calls: which blocks are saved and loaded at which step
    geometry.py    versions and models that are served, the pool's layout, views of vLLM's tensors in that layout
    store.py       blocks of the pool by hash: pins, eviction, reservations; the only writer of the pool
    share.py       pool.sock: hands the sealed memfd to the gateway and answers for its blocks
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # vLLM is imported only where vLLM asks for the connector: the store is tested without it.
    if name == "MidstreamConnector":
        from midstream_runtime.vllm_connector.connector import MidstreamConnector

        return MidstreamConnector
    raise AttributeError(name)
