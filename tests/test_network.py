"""The interface by which the nodes of a run reach each other."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest

from crowdlayer.machine.launch import Launch, announced
from crowdlayer.machine.network import interface_towards
from tests.conftest import ROOT

HOST = """
ip link set lo up
ip link add d0 type veth peer name p0 && ip addr add 10.9.0.1/24 dev d0 && ip link set d0 up && ip link set p0 up
{more}
exec {python} -c 'from crowdlayer.machine.network import interface_towards as towards
print(*map(towards, ["10.9.0.7", "10.9.0.1", "127.0.1.1", "nowhere.invalid", "fd00::7"]))'
"""
SECOND = (
    "ip link add d1 type veth peer name p1 && ip addr add 10.8.0.1/24 dev d1 && ip link set d1 up && ip link set p1 up"
)
ROUTE = f"{SECOND}\nip route add default via 10.8.0.9"
IPV6 = SECOND.replace("ip addr add 10.8.0.1/24 dev d1", "ip addr add fd00::1/64 dev d1 nodad")
IPV6_ROUTE = f"{IPV6}\nip route add default via fd00::9"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="a network namespace needs root, and ip")
@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("", "d0 d0 d0 d0 d0"),
        (SECOND, "d0 d0 None None None"),
        (ROUTE, "d0 d0 d1 d1 d1"),
        (IPV6, "d0 d0 None None d1"),
        (IPV6_ROUTE, "d0 d0 d1 d1 d1"),
    ],
    ids=["one", "two", "route", "IPv6", "IPv6 route"],
)
def test_the_interface_is_the_one_that_leads_to_the_first_node(more: str, found: str) -> None:
    """Which that node may know by a name of the loopback alone, as Debian's /etc/hosts has it."""
    script = HOST.format(more=more, python=sys.executable)
    done = subprocess.run(
        ["unshare", "--net", "sh", "-e", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{found}\n", done.stderr


JOIN = """
import os, sys
from crowdlayer.errors import PeerError
from crowdlayer.machine.launch import Launch
from crowdlayer.machine.meeting import Meeting
from crowdlayer.machine.processes import join

index = int(sys.argv[1])
meeting = (Meeting.join if index else Meeting.host)(Launch(port=29500), 60)
meeting.timeout = 2
try:
    join(meeting, index, 2)
except PeerError as error:
    print(f"{error}\\n", end="", flush=True)
os._exit(0)
"""
BEHIND_FIREWALL = """
ip link set lo up
iptables -A INPUT -p tcp --syn ! --dport 29500 -j DROP
{python} -c "$1" 0 & {python} -c "$1" 1 & wait
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or None in (shutil.which("ip"), shutil.which("iptables")),
    reason="a network namespace needs root, and ip; a firewall iptables",
)
def test_processes_that_reach_each_other_at_the_masters_port_alone_wait_no_longer_than_the_time_out() -> None:
    """gloo by itself tries for five times as long."""
    script = BEHIND_FIREWALL.format(python=sys.executable)
    done = subprocess.run(
        ["unshare", "--net", "sh", "-e", "-c", script, "sh", JOIN], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    line = "2 processes must reach each other at any port, not at MASTER_PORT alone, within TIMEOUT=2 s\n"
    assert done.stdout == 2 * line, done.stderr


def test_gloo_is_told_where_there_are_several_nodes_and_nobody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    several = Launch("explicit", 2, 1, socket.gethostname(), 29500)
    name = interface_towards(several.address)
    assert announced(several) == ({} if name is None else {"GLOO_SOCKET_IFNAME": name})
    assert announced(Launch()) == {}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert announced(several) == {}
