"""By which network interface this node reaches the others, where its host name does not say it."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .cgroups import lines

ANYWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses of documentation's: the way to them is the default route. Nothing is sent."""
SIOCGIFADDR = 0x8915
"""Linux's question for an interface's IPv4 address, from which byte 20 on the answer has it."""
IF_INET6 = Path("/proc/net/if_inet6")
"""A line for each IPv6 address: it, the interface's number, the prefix, the scope, flags and the interface."""


def interface_towards(host: str) -> str | None:
    """The interface that leads to `host`, or has its address; None: no other than the loopback is known to.

    gloo would announce what the host name resolves to, and in Debian's /etc/hosts that is 127.0.1.1. A first node may
    know itself by such a name alone: then it is the interface of the default route, or the only one.
    """
    names = dict(_interfaces())
    for target in (host, *ANYWHERE):
        if (name := names.get(_source(target))) is not None:
            return name
    return next(iter(names.values())) if len(set(names.values())) == 1 else None


def _interfaces() -> Iterator[tuple[str, str]]:
    """The addresses that this machine has, and the interface of each; but for the loopback's, and those of a link."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                address = socket.inet_ntoa(answer[20:24])
                if not address.startswith("127."):
                    yield address, name
    for line in lines(IF_INET6):
        digits, _, _, scope, _, name = line.split()
        if scope == "00":
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), name


def _source(target: str) -> str:
    """The address of this machine from which packets to `target` go."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            address: str = probe.getsockname()[0]
            return address
    return ""
