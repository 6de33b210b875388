"""Where this machine is on the network, seen from a rendezvous: for launch/multinode.sh.

    python launch/address.py HOST:PORT [INTERFACE]

Prints ``is_host address interface``: whether HOST is this machine (0 or 1), the address that others reach it
at, and the network interface that has it. Linux, IPv4. On an error prints that, and exits with 1.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys

SIOCGIFADDR = 0x8915


def address_of(interface: str) -> str | None:
    """Its IPv4 address, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def source_towards(host: str, port: int) -> str:
    """The address that packets to ``host`` leave from; none is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def is_here(host: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))  # refused unless the address is this machine's own
        except OSError:
            return False
    return True


def look(endpoint: str, interface: str) -> str:
    host, _, port = endpoint.rpartition(":")
    there = {name: address_of(name) for _, name in socket.if_nameindex()}
    listed = ", ".join(f"{name} ({address or 'no IPv4 address'})" for name, address in there.items())
    if interface and there.get(interface) is None:
        raise ValueError(f"IFACE={interface!r} has no IPv4 address on this machine. There are: {listed}")
    try:
        numeric = socket.gethostbyname(host)
        address = there[interface] if interface else source_towards(numeric, int(port))
    except socket.gaierror as error:
        raise ValueError(f"RDZV_ENDPOINT: no address is known for {host!r} ({error.strerror})") from None
    except OSError as error:
        raise ValueError(
            f"RDZV_ENDPOINT: no way from this machine to {host!r} ({error.strerror}). There are: {listed}"
        ) from None
    if not interface:
        interface = next((name for name, its in there.items() if its == address), "")
        if not interface:
            raise ValueError(f"none of the interfaces has {address}: set IFACE. There are: {listed}")
    return f"{int(is_here(numeric))} {address} {interface}"


if __name__ == "__main__":
    try:
        print(look(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""))
    except (ValueError, OverflowError) as problem:
        print(problem)
        sys.exit(1)
