"""The Python side of bpf/midstream_maps.h: sizes, constants and the maps.

The contract test (tests/contract/test_maps_layout.py) compares all of it with the header; the loader passes
the sizes to the compiler, which refuses to build programs for other ones.
"""

from __future__ import annotations

import struct

from midstream_agent.bpf import F_NO_PREALLOC, MAP_TYPE_HASH, MAP_TYPE_PERCPU_ARRAY, MapSpec

FLOW_LIVE, FLOW_FROZEN, FLOW_HELD, FLOW_MOVED, FLOW_NOT_HERE = range(5)
CTL_TIMESTAMPS, CTL_STEER = 1, 2
ADDR_LEAVING = 1
NOTE_SEG, NOTE_DATA, NOTE_RST, NOTE_FIN, NOTE_TS, NOTE_RST_SEEN = (1 << i for i in range(6))
NOTE_DATA_MAX = 2048
MARK_ANSWER = 0x4D530001
COUNTERS_MAX = 64

# names of enum ms_reason, in order
REASONS = (
    "pass_unknown", "absorb_frozen", "absorb_held", "answer_zero_window", "gate_drop", "gate_pass_answer",
    "moved_drop", "syn_leaving", "dead_drop", "malformed", "note_busy", "answer_failed", "fragment",
    "bad_checksum", "note_missing", "skewed",
)  # fmt: skip

KEY = struct.Struct("=16s16s2s2s")  # local, remote, local_port, remote_port: network order
CTL = struct.Struct("=8I")  # state, flags, snd_nxt, rcv_nxt, tsval, peer, epoch, pad
# version, flags, seq, ack, window, tsval, tsecr, data_seq, data_len, absorbed, answered, rst_seq, data
NOTE = struct.Struct(f"=12I{NOTE_DATA_MAX}s")
ADDR_KEY = struct.Struct("=16s")
ADDR_CTL = struct.Struct("=4I")  # state, peer, epoch, pad

FLOWS_MAX = 65536
ADDRS_MAX = 4096

# Without preallocation: 65,536 notes would be 137 MB.
MAPS = (
    MapSpec("ms_flows", MAP_TYPE_HASH, KEY.size, CTL.size, FLOWS_MAX, F_NO_PREALLOC),
    MapSpec("ms_notes", MAP_TYPE_HASH, KEY.size, NOTE.size, FLOWS_MAX, F_NO_PREALLOC),
    MapSpec("ms_addrs", MAP_TYPE_HASH, ADDR_KEY.size, ADDR_CTL.size, ADDRS_MAX, F_NO_PREALLOC),
    MapSpec("ms_counters", MAP_TYPE_PERCPU_ARRAY, 4, 8, COUNTERS_MAX),
)
PROGRAMS = ("ms_hold_ingress", "ms_gate_egress", "ms_nic_ingress")
