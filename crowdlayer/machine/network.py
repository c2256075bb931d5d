"""By which network interface this node reaches the others, where its host name does not say it."""

from __future__ import annotations

import fcntl
import socket
import struct

ANYWHERE = "192.0.2.1"
"""An address of documentation's: the way to it is the default route. Nothing is sent."""
SIOCGIFADDR = 0x8915
"""Linux's question for an interface's IPv4 address, from which byte 20 on the answer has it."""


def interface_towards(host: str) -> str | None:
    """The interface that leads to `host`, or has its address; None: no other than the loopback is known to.

    gloo would announce what the host name resolves to, and in Debian's /etc/hosts that is 127.0.1.1. A first node may
    know itself by such a name alone: then it is the interface of the default route, or the only one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        names = dict(_interfaces(probe))
    for target in (host, ANYWHERE):
        if (name := names.get(_source(target))) is not None:
            return name
    return next(iter(names.values())) if len(names) == 1 else None


def _interfaces(probe: socket.socket) -> list[tuple[str, str]]:
    """The address of each interface that has one, and its name; but for the loopback."""
    found = []
    for _, name in socket.if_nameindex():
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            continue  # it has none
        found.append((socket.inet_ntoa(answer[20:24]), name))
    return [(address, name) for address, name in found if not address.startswith("127.")]


def _source(target: str) -> str:
    """The address of this machine from which packets to `target` go."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return ""
