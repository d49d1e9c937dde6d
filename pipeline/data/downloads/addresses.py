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
UNICAST = ipaddress.IPv6Network("2000::/3")
"""The only IPv6 addresses that are assigned to public hosts (RFC 4291); some of them are not public."""
DOCUMENTATION = (ipaddress.IPv6Network("2001:db8::/32"), ipaddress.IPv6Network("3fff::/20"))
TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::ffff:0:0:0/96"))
"""NAT64 (RFC 6052) and SIIT (RFC 2765): the last 32 bits are an IPv4 address."""
LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215; the site chooses the length of the prefix
COMPATIBLE = ipaddress.IPv6Network("::/96")  # the old form ::a.b.c.d


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
        if isinstance(address, ipaddress.IPv4Address):
            return address.is_global
        if _embedded(address):
            return address not in COMPATIBLE
        return address.is_global and address in UNICAST and not any(address in network for network in DOCUMENTATION)


def _embedded(address: Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses in an IPv6 address: mapped, 6to4, Teredo, NAT64, SIIT, and the old form ::a.b.c.d."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    bits = int(address)
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in TRANSLATED) or (address in COMPATIBLE and bits > 1):
        found.append(ipaddress.IPv4Address(bits & 0xFFFFFFFF))
    if address in LOCAL_NAT64:
        found += map(ipaddress.IPv4Address, _local_nat64(bits))
    return [each for each in found if each is not None]


def _local_nat64(bits: int) -> list[int]:
    """The IPv4 addresses that an address of LOCAL_NAT64 may contain, for prefixes of 96, 64, 56 and 48 bits (RFC 6052,
    section 2.2). Bits 64 to 71 are not part of the IPv4 address."""
    last = bits & 0xFFFFFFFF
    if not (bits >> 32) & 0xFFFFFFFFFFFF:  # only zeros after the first 48 bits: the prefix has 96 bits
        return [last]
    joined = ((bits >> 64) & 0xFFFF) << 56 | bits & (1 << 56) - 1  # the last 80 bits, without bits 64 to 71
    return [last, *((joined >> shift) & 0xFFFFFFFF for shift in (24, 32, 40))]


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
