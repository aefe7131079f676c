"""The testbed's network is as strict as EC2 and EKS: a real packet meets each rule."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import Iterator

import pytest
from midstream_testbed import Namespace, Vpc, pcap, plumbing

FLOATING = {4: "10.77.0.100", 6: "fd77::f:100"}
STRANGER = {4: "10.77.0.150", 6: "fd77::f:150"}
PORT = 8000
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75


class World:
    """Two hosts with a pod each, clients, and one floating address a family, plumbed by hand at node-a."""

    def __init__(self, vpc: Vpc) -> None:
        self.vpc = vpc
        self.a, self.b = vpc.host("node-a", configured=True), vpc.host("node-b", configured=True)
        self.out, self.inside = vpc.client("client"), vpc.client("client-in", in_vpc=True)
        self.pod_a, self.pod_b = self.a.add_pod("llm-0"), self.b.add_pod("llm-0")
        for ip in FLOATING.values():
            vpc.allocate(ip, self.a)
            plumbing.plumb(self.pod_a, ip)

    def home(self) -> None:
        """Back to the state that every test starts from."""
        for hook in ("refuse", "lie"):
            setattr(self.vpc.fabric, hook, False)
        self.vpc.fabric.move_seconds = 0
        for ip in FLOATING.values():
            self.vpc.assign(ip, self.a)
            plumbing.unplumb(self.pod_b, ip)
        for host in (self.a, self.b):
            host.run(["conntrack", "-F"])
            host.sysctl({"netfilter/nf_conntrack_tcp_loose": 1})

    def move(self, ip: str) -> None:
        """Plumb the address at node-b as well and announce it there."""
        plumbing.plumb(self.pod_b, ip)
        plumbing.announce(self.b, ip)
        assert self.vpc.fabric.wait_owner(ip, "node-b")


BOTH_MTUS = pytest.mark.parametrize("built", [9001, 1500], indirect=True, ids=["mtu9001", "mtu1500"])


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Iterator[World]:
    with Vpc.create(mtu=getattr(request, "param", 9001)) as vpc:
        yield World(vpc)


@pytest.fixture
def world(built: World) -> World:
    built.home()
    return built


def clients(world: World) -> dict[str, Namespace]:
    return {"outside": world.out, "in the vpc": world.inside, "other node": world.b, "same node": world.a}


def echo(client: Namespace, server: Namespace, ip: str, payload: bytes = b"token") -> tuple[str, int]:
    """One connection, one message there and back; returns the address that the server saw."""
    with server.listen(ip, PORT) as listener:
        listener.settimeout(5)
        with client.connect(ip, PORT) as ours:
            theirs, peer = listener.accept()
            with theirs:
                ours.sendall(payload)
                assert receive(theirs, len(payload)) == payload
                theirs.sendall(payload)
                assert receive(ours, len(payload)) == payload
            return str(peer[0]), int(peer[1])


def receive(sock: socket.socket, size: int) -> bytes:
    sock.settimeout(5)
    data = b""
    while len(data) < size and (chunk := sock.recv(size - len(data))):
        data += chunk
    return data


def reachable(client: Namespace, server: Namespace, ip: str) -> bool:
    try:
        with server.listen(ip, PORT), client.connect(ip, PORT, timeout_s=0.5):
            return True
    except OSError:
        return False


# -- reaching a floating address


@BOTH_MTUS
@pytest.mark.parametrize("version", [4, 6])
def test_every_client_reaches_the_pod_before_and_after_a_move(world: World, version: int) -> None:
    ip = FLOATING[version]
    for name, client in clients(world).items():
        assert echo(client, world.pod_a, ip), name
    world.move(ip)
    for client in (world.out, world.inside):
        peer, _ = echo(client, world.pod_b, ip)
        assert peer in (client.ipv4, client.ipv6), "no address may be rewritten on the way"


@BOTH_MTUS
@pytest.mark.parametrize("version", [4, 6])
def test_segments_fill_the_mtu_and_larger_packets_do_not_pass(world: World, version: int) -> None:
    ip, mtu = FLOATING[version], world.vpc.mtu
    headers = 20 if version == 4 else 40
    with world.out.capture() as capture:
        echo(world.out, world.pod_a, ip, payload=bytes(200_000))
    packets = capture.stop()
    assert {p.mss for p in packets if p.syn} == {mtu - headers - 20}
    ping = ["ping", "-c1", "-W1", "-M", "do", "-s"]
    assert not world.out.run([*ping, str(mtu - headers - 8), ip], check=False).returncode
    assert world.out.run([*ping, str(mtu - headers - 7), ip], check=False).returncode


def test_the_router_answers_for_every_address_of_the_subnet(world: World) -> None:
    world.inside.run(["ip", "neigh", "flush", "dev", "eth0"])
    assert not world.inside.run(["ping", "-c1", "-W1", FLOATING[4]], check=False).returncode
    router_mac = world.vpc.router.run(
        ["ip", "-br", "link", "show", world.inside.eth0.router_ifname]
    ).stdout.split()
    neighbours = world.inside.run(["ip", "neigh", "show", FLOATING[4]]).stdout
    assert router_mac[2] in neighbours


@pytest.mark.parametrize("target", ["169.254.169.254", "192.0.2.1", "8.8.8.8"])
def test_nothing_leads_off_the_testbed(world: World, target: str) -> None:
    for place in (world.a, world.pod_a, world.out, world.inside, world.vpc.router):
        assert place.run(["ping", "-c1", "-W0.2", target], check=False).returncode, place


def test_a_floating_address_survives_on_no_host_interface(world: World) -> None:
    for host in (world.a, world.b):
        for ip in FLOATING.values():
            assert ip not in host.run(["ip", "addr"]).stdout


# -- anti-spoofing


def send_from(place: Namespace, source: str, target: str, through: str | None = None) -> None:
    """One UDP packet with a source address of our choice, local or not."""
    version6 = ":" in source
    with place.new_socket(socket.AF_INET6 if version6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        level, option = (
            (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if version6 else (socket.IPPROTO_IP, IP_TRANSPARENT)
        )
        sock.setsockopt(level, option, 1)
        if through:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, through.encode())
        sock.bind((source, 0))
        sock.sendto(b"spoofed", (target, 9))


@contextlib.contextmanager
def heard_at(place: Namespace, target: str, sources: list[str]) -> Iterator[None]:
    """UDP packets to port 9 of `place` in this block come from exactly these sources."""
    with place.new_socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((target, 9))
        yield
        sock.settimeout(0.3)
        heard = []
        with contextlib.suppress(TimeoutError):
            while True:
                heard.append(sock.recvfrom(100)[1][0])
        assert heard == sources


@pytest.mark.parametrize("version", [4, 6])
def test_a_source_address_of_another_interface_is_dropped_and_counted(world: World, version: int) -> None:
    target = world.inside.ipv4 if version == 4 else world.inside.ipv6
    own = world.b.ipv4 if version == 4 else world.b.ipv6
    before = world.vpc.spoofed().get("node-b/eth0", 0)
    with heard_at(world.inside, target, [own]):
        send_from(world.b, own, target, "eth0")
        send_from(world.b, STRANGER[version], target, "eth0")
        send_from(world.b, FLOATING[version], target, "eth0")
    assert world.vpc.spoofed()["node-b/eth0"] - before == 2


@pytest.mark.parametrize("version", [4, 6])
def test_after_a_move_the_old_owner_may_not_use_the_address_any_more(world: World, version: int) -> None:
    ip = FLOATING[version]
    target = world.inside.ipv4 if version == 4 else world.inside.ipv6
    before = world.vpc.spoofed().get("node-a/eth1", 0)
    with heard_at(world.inside, target, [ip, ip]):
        send_from(world.a, ip, target, "eth1")
        world.move(ip)
        send_from(world.a, ip, target, "eth1")
        send_from(world.b, ip, target, "eth1")
    assert world.vpc.spoofed()["node-a/eth1"] - before == 1


# -- the hosts' firewall


def test_a_connection_that_a_pod_begins_is_dropped_by_policy(world: World) -> None:
    before = world.a.counters()["pod_first"]
    assert not reachable(world.pod_a, world.inside, world.inside.ipv4)
    assert not reachable(world.pod_a, world.inside, world.inside.ipv6)
    assert world.a.counters()["pod_first"] > before
    free = world.a.add_pod("free", may_connect=True)
    try:
        assert reachable(free, world.inside, world.inside.ipv4)
    finally:
        free.delete()


def test_a_flow_that_a_pod_begins_is_rewritten_to_the_node_outside_the_vpc_only(world: World) -> None:
    free = world.a.add_pod("free", may_connect=True)
    before = world.a.counters()["snatted"]
    try:
        assert echo(free, world.out, world.out.ipv4)[0] == world.a.ipv4
        assert echo(free, world.inside, world.inside.ipv4)[0] == free.ipv4
        assert echo(free, world.out, world.out.ipv6)[0] == free.ipv6, "EKS has no NAT for IPv6"
    finally:
        free.delete()
    assert world.a.counters()["snatted"] - before == 1


def tcp_packet(src: str, dst: str, sport: int, dport: int, seq: int, ack: int, flags: int) -> bytes:
    """An IP packet with a bare TCP header and correct checksums."""
    family = socket.AF_INET6 if ":" in src else socket.AF_INET
    source, target = socket.inet_pton(family, src), socket.inet_pton(family, dst)
    tcp = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 5 << 4, flags, 8192, 0, 0)
    tcp = tcp[:16] + struct.pack("!H", checksum(source + target + struct.pack("!II", 20, 6) + tcp)) + tcp[18:]
    if family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, 20, 6, 64) + source + target + tcp
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + source + target
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + tcp


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def send_ip(place: Namespace, packet: bytes, dst: str) -> None:
    """Send a whole IP packet from where it can be routed."""
    family = socket.AF_INET6 if ":" in dst else socket.AF_INET
    with place.new_socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(packet, (dst, 0))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("loose", [1, 0], ids=["loose", "tracked"])
def test_mid_stream_packets_are_taken_for_a_flow_only_where_conntrack_is_loose(
    world: World, version: int, loose: int
) -> None:
    source = world.out.ipv4 if version == 4 else world.out.ipv6
    world.a.sysctl({"netfilter/nf_conntrack_tcp_loose": loose})
    before = world.a.counters()["invalid"]
    packet = tcp_packet(source, FLOATING[version], 40000, 9, 1000, 2000, pcap.ACK)
    with world.pod_a.capture() as capture:
        send_ip(world.out, packet, FLOATING[version])
        world.out.run(
            ["ping", "-c1", "-W1", FLOATING[version]]
        )  # ordering: the capture has seen what came before
    arrived = pcap.select(capture.stop(), src=source, sport=40000)
    assert len(arrived) == loose
    assert world.a.counters()["invalid"] - before == 1 - loose


@pytest.mark.parametrize("version", [4, 6])
def test_invalid_packets_are_dropped_by_the_host(world: World, version: int) -> None:
    """A SYN-ACK that answers nothing."""
    source = world.out.ipv4 if version == 4 else world.out.ipv6
    before = world.a.counters()["invalid"]
    packet = tcp_packet(source, FLOATING[version], 40001, 9, 1000, 2000, pcap.SYN | pcap.ACK)
    send_ip(world.out, packet, FLOATING[version])
    world.out.run(["ping", "-c1", "-W1", FLOATING[version]])
    assert world.a.counters()["invalid"] - before == 1


@pytest.mark.parametrize("version", [4, 6])
def test_a_restored_flow_whose_first_packet_is_the_pods_is_dropped_and_one_primed_by_the_client_lives(
    world: World, version: int
) -> None:
    source = world.out.ipv4 if version == 4 else world.out.ipv6
    ip = FLOATING[version]
    from_pod = tcp_packet(ip, source, PORT, 40002, 5000, 6000, pcap.ACK | pcap.PSH)
    from_client = tcp_packet(source, ip, 40002, PORT, 6000, 5000, pcap.ACK)
    with world.out.capture() as capture:
        send_ip(world.pod_a, from_pod, source)
        world.out.run(["ping", "-c1", "-W1", ip])
        assert pcap.select(capture.packets, src=ip, dport=40002) == []
        send_ip(world.out, from_client, ip)
        world.out.run(["ping", "-c1", "-W1", ip])
        send_ip(world.pod_a, from_pod, source)
        world.out.run(["ping", "-c1", "-W1", ip])
    assert len(pcap.select(capture.stop(), src=ip, dport=40002, sport=PORT)) >= 1


def test_interfaces_that_nobody_configured_filter_by_reverse_path(world: World) -> None:
    """The floating address without its route and rules: the host drops what the pod sends from it."""
    ip = "10.77.0.140"
    world.vpc.allocate(ip, world.a)
    world.pod_a.run(["ip", "addr", "add", f"{ip}/32", "dev", "eth0"], privileged=True)
    before = reverse_path_drops(world.a)
    send_from(world.pod_a, ip, world.inside.ipv4)
    assert reverse_path_drops(world.a) == before + 1
    world.pod_a.run(["ip", "addr", "del", f"{ip}/32", "dev", "eth0"], privileged=True)
    plumbing.plumb(world.pod_a, ip)
    assert echo(world.out, world.pod_a, ip)
    assert reverse_path_drops(world.a) == before + 1
    plumbing.unplumb(world.pod_a, ip)
    world.vpc.release(ip)


def reverse_path_drops(place: Namespace) -> int:
    names, values = (
        line.split() for line in place.proc_net("netstat").splitlines() if line.startswith("TcpExt:")
    )
    return int(values[names.index("IPReversePathFilter")])


# -- interfaces


def test_a_secondary_interface_arrives_down_and_without_an_address(world: World) -> None:
    host = world.vpc.host("node-c")
    try:
        shown = host.run(["ip", "addr", "show", "eth1"]).stdout
        assert "state DOWN" in shown and "inet" not in shown
        assert host.read_sysctl("ipv4/conf/eth1/rp_filter") == "1"
        assert host.eth1.mac in shown and host.eth1.gateway4 == "10.77.0.1"
    finally:
        host.delete()


@pytest.mark.parametrize(("name", "summed"), [("node-a", False), ("node-b", True)])
def test_one_host_sums_in_software(world: World, name: str, summed: bool) -> None:
    """What a capture of the wire shows: without offload the checksum on it is right."""
    host = world.vpc.hosts[name]
    pod = {"node-a": world.pod_a, "node-b": world.pod_b}[name]
    if host is world.b:
        world.move(FLOATING[4])
    with world.out.capture() as capture:
        echo(world.out, pod, FLOATING[4])
    capture.stop()
    listing = world.out.run(["tcpdump", "-nvv", "-r", str(capture.path), "src", FLOATING[4]]).stdout
    assert ("incorrect" not in listing) == summed


def test_a_pods_veth_carries_a_foreign_filter_in_both_directions(world: World) -> None:
    for direction in ("ingress", "egress"):
        shown = world.a.run(["tc", "filter", "show", "dev", world.pod_a.host_ifname, direction]).stdout
        assert re.search(r"pref 1 bpf.*handle 0x1 foreign_pass direct-action", shown), shown


def test_pods_have_the_cnis_routes_and_rules(world: World) -> None:
    rules = world.a.run(["ip", "rule"]).stdout
    assert f"512:\tfrom all to {world.pod_a.ipv4} lookup main" in rules
    routes = world.pod_a.run(["ip", "route"]).stdout
    assert "default via 169.254.1.1 dev eth0" in routes
    assert "PERMANENT" in world.pod_a.run(["ip", "neigh", "show", "169.254.1.1"]).stdout
    assert world.pod_a.host_ifname.startswith("eni")
    assert world.pod_a.read_sysctl("ipv4/tcp_ecn") == "0"


@pytest.mark.parametrize("control", ["reno", "cubic", "bbr"])
def test_congestion_control_is_a_pods_own(world: World, control: str) -> None:
    """The accepting pod has it, its client keeps its own."""
    ip, default = FLOATING[4], world.out.read_sysctl("ipv4/tcp_congestion_control")
    world.pod_a.set_congestion_control(control)
    with world.pod_a.listen(ip, PORT) as listener, world.out.connect(ip, PORT) as ours:
        theirs, _ = listener.accept()
        with theirs:
            assert congestion_control(theirs) == control
            assert congestion_control(ours) == default


def congestion_control(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def test_clients_in_pods_reach_the_address_on_their_node_and_on_the_other(world: World) -> None:
    near = world.a.add_pod("near")
    far = world.b.add_pod("far", may_connect=True)
    try:
        for version in (4, 6):
            assert echo(near, world.pod_a, FLOATING[version])
            assert echo(far, world.pod_a, FLOATING[version])
    finally:
        near.delete()
        far.delete()


# -- controls: the same packets where a rule is left out


def test_without_strictness_the_same_packets_pass() -> None:
    with Vpc.create(strict=False) as vpc:
        host, inside, out = (
            vpc.host("node-a", configured=True),
            vpc.client("in", in_vpc=True),
            vpc.client("out"),
        )
        pod = host.add_pod("llm-0")
        assert reachable(pod, inside, inside.ipv4), "no policy"
        assert echo(pod, out, out.ipv4)[0] == pod.ipv4, "no address translation"


@pytest.mark.parametrize("tracked", [False, True])
def test_a_tracked_security_group_drops_a_flow_that_its_interface_never_saw_begin(tracked: bool) -> None:
    with Vpc.create(tracked_security_group=tracked) as vpc:
        world = World(vpc)
        ip = FLOATING[4]
        assert echo(world.out, world.pod_a, ip)
        assert echo(world.out, world.pod_a, FLOATING[6])
        with world.pod_a.listen(ip, PORT) as listener, world.out.connect(ip, PORT) as ours:
            theirs, _ = listener.accept()
            with theirs:
                theirs.sendall(b"seen from its beginning")
                assert receive(ours, 23) == b"seen from its beginning"
                port = ours.getsockname()[1]
            world.move(ip)
            packet = tcp_packet(world.out.ipv4, ip, port, 9, 1, 1, pcap.ACK)
            with world.pod_b.capture() as capture:
                send_ip(world.out, packet, ip)
                world.out.run(["ping", "-c1", "-W1", ip])
            assert len(pcap.select(capture.stop(), sport=port, dport=9)) == (0 if tracked else 1)
