"""The Python side of bpf/midstream_maps.h: sizes, constants and the maps.

The contract test (tests/contract/test_maps_layout.py) compares all of it with the header; the loader passes
the sizes to the compiler, which refuses to build programs for other ones.
"""

from __future__ import annotations

import struct

from midstream_agent.bpf import (
    F_NO_PREALLOC,
    MAP_TYPE_ARRAY,
    MAP_TYPE_HASH,
    MAP_TYPE_LRU_HASH,
    MAP_TYPE_PERCPU_ARRAY,
    MapSpec,
)

FLOW_LIVE, FLOW_FROZEN, FLOW_HELD, FLOW_MOVED, FLOW_HERE = range(5)
CTL_TIMESTAMPS = 1
ADDR_LEAVING, ADDR_ARRIVING, ADDR_SETTLED, ADDR_GONE = range(1, 5)
ADDR_TUNNEL, ADDR_SYN_PEER, ADDR_SYN_HERE, ADDR_OUT_TUNNEL, ADDR_OUT_DIRECT = (1 << i for i in range(5))
NOTE_SEG, NOTE_DATA, NOTE_RST, NOTE_FIN, NOTE_TS, NOTE_RST_SEEN = (1 << i for i in range(6))
NOTE_DATA_MAX = 2048
MARK_ANSWER, MARK_TUNNEL = 0x4D530001, 0x4D530002
BORN_HERE, BORN_PEER = 1, 2
COUNTERS_MAX = 64

# names of enum ms_reason, in order
REASONS = (
    "pass_unknown", "absorb_frozen", "absorb_held", "answer_zero_window", "gate_drop", "gate_pass_answer",
    "moved_drop", "syn_leaving", "dead_drop", "malformed", "note_busy", "answer_failed", "fragment",
    "bad_checksum", "note_missing", "skewed", "tunnel_out", "tunnel_in", "tunnel_emit", "tunnel_probe", "tunnel_peer",
    "tunnel_loop", "tunnel_failed", "steer_local", "out_both", "out_bulk",
)  # fmt: skip

KEY = struct.Struct("=16s16s2s2s")  # local, remote, local_port, remote_port: network order
CTL = struct.Struct("=8I")  # state, flags, snd_nxt, rcv_nxt, tsval, pad x 3
# version, flags, seq, ack, window, tsval, tsecr, data_seq, data_len, absorbed, answered, rst_seq, data
NOTE = struct.Struct(f"=12I{NOTE_DATA_MAX}s")
ADDR_KEY = struct.Struct("=16s")
# state, flags, epoch, vni, peer, pod_ifindex, pod_mac, seen, pad
ADDR_CTL = struct.Struct("=4I16sI6sB1s")
BIRTH = struct.Struct("=I")
COPIES = struct.Struct("=2IQQ")  # flow, end, last_ns, full_ns
# nic_ifindex, tunnel_ifindex, probe_port (network order), nic_mac, gateway_mac_v4, gateway_mac_v6, pad
CONF = struct.Struct("=2I2s6s6s6s4s")

FLOWS_MAX = 65536
ADDRS_MAX = 4096
BIRTHS_MAX = 65536
COPIES_MAX, COPY_BURST, COPY_NS_BYTE, COPY_PAUSE_NS = 4096, 65536, 1000, 2_000_000

# Without preallocation: 65,536 notes would be 137 MB.
MAPS = (
    MapSpec("ms_flows", MAP_TYPE_HASH, KEY.size, CTL.size, FLOWS_MAX, F_NO_PREALLOC),
    MapSpec("ms_notes", MAP_TYPE_HASH, KEY.size, NOTE.size, FLOWS_MAX, F_NO_PREALLOC),
    MapSpec("ms_addrs", MAP_TYPE_HASH, ADDR_KEY.size, ADDR_CTL.size, ADDRS_MAX, F_NO_PREALLOC),
    MapSpec("ms_births", MAP_TYPE_LRU_HASH, KEY.size, BIRTH.size, BIRTHS_MAX),
    MapSpec("ms_copies", MAP_TYPE_ARRAY, 4, COPIES.size, COPIES_MAX),
    MapSpec("ms_conf", MAP_TYPE_ARRAY, 4, CONF.size, 1),
    MapSpec("ms_counters", MAP_TYPE_PERCPU_ARRAY, 4, 8, COUNTERS_MAX),
)
PROGRAMS = (
    "ms_hold_ingress", "ms_gate_egress", "ms_nic_ingress", "ms_nic_egress", "ms_tunnel_ingress", "ms_route_egress",
)  # fmt: skip
