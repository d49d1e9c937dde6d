"""Restricts the addresses that downloads may connect to: a list of URLs, or a redirect, must not make this machine read
its own network. The check happens at connection time: the resolver returns only allowed addresses, and every socket is
checked again before it connects. This prevents DNS rebinding, where a name resolves to another address the second time.
"""

import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from aiohttp import abc, resolver

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
METADATA = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.0.0/16",  # link-local: AWS, Google Cloud, Azure and others serve a machine's credentials here
        "fe80::/10",
        "fd00:ec2::254/128",  # AWS
        "fd20:ce::254/128",  # Google Cloud
        "100.100.100.200/32",  # Alibaba Cloud
        "168.63.129.16/32",  # Azure's host agent, a public address
        "192.0.0.192/32",  # Oracle Cloud
    )
)
"""Addresses that no setting allows, because clouds serve credentials there."""
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedAddress(OSError):
    """Raised for a host without an allowed address."""


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """allow_private: allow all addresses except METADATA. networks: private networks
    that are allowed in addition to public addresses."""

    allow_private: bool = False
    networks: tuple[Network, ...] = ()

    def allows(self, text: str) -> bool:
        """Whether connections to the IP address `text` are allowed. For an IPv6 address that
        embeds an IPv4 address, both must be allowed."""
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        return all(self._allows(each) for each in (address, *_embedded(address)))

    def _allows(self, address: Address) -> bool:
        if address.is_multicast or any(address in network for network in METADATA):
            return False
        if self.allow_private or any(address in network for network in self.networks):
            return True
        return (isinstance(address, ipaddress.IPv6Address) and bool(_embedded(address))) or address.is_global


def _embedded(address: Address) -> list[Address]:
    """The IPv4 addresses in an IPv6 address: mapped, 6to4, Teredo, NAT64, and the old form ::a.b.c.d."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in NAT64 or 1 < int(address) < 1 << 32:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


class CheckedResolver(abc.AbstractResolver):
    """The system's resolver, restricted to allowed addresses."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy, self._resolver = policy, resolver.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[abc.ResolveResult]:
        """Raises RefusedAddress if no address is allowed, OSError if the name does not resolve."""
        found = await self._resolver.resolve(host, port, family)
        allowed = [entry for entry in found if self._policy.allows(entry["host"])]
        if not allowed:
            raise RefusedAddress(f"{host} is at {found[0]['host']}" if found else host)
        return allowed

    async def close(self) -> None:
        await self._resolver.close()


def checked_socket(policy: AddressPolicy) -> Any:
    """A `socket_factory` for aiohttp's connector. Raises RefusedAddress for an address that is not allowed."""

    def create(address_info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = address_info
        if not policy.allows(address[0]):
            raise RefusedAddress(str(address[0]))
        return socket.socket(family, kind, protocol)

    return create
