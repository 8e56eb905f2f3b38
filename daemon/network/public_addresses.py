"""Decides which IP addresses are public, also in the IPv6 forms that hide a private IPv4 address."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address


# Azure's metadata server has an address that counts as public.
_CLOUD_METADATA = frozenset({ip_address("168.63.129.16")})


# Special addresses on which Python versions disagree. Oracle's cloud has its metadata server in the first
# network, Alibaba's in the second.
_SPECIAL_IPV4 = tuple(
    IPv4Network(net)
    for net in (
        "192.0.0.0/24",
        "100.64.0.0/10",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "192.31.196.0/24",
        "192.52.193.0/24",
    )
)


_NAT64 = IPv6Network("64:ff9b::/96")


_SIX_TO_FOUR = IPv6Network("2002::/16")


# Forms that hide an IPv4 address or a tunnel and that no URL needs: compatible, translated,
# local NAT64, Teredo, deprecated site-local.
_HIDDEN_FORMS = tuple(
    IPv6Network(net) for net in ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "2001::/32", "fec0::/10")
)


def is_public(address: Address) -> bool:
    """True for unicast addresses of the public internet. For an IPv6 form of an IPv4 address, checks that address."""
    if address in _CLOUD_METADATA:
        return False
    if isinstance(address, IPv6Address):
        inner = _embedded_ipv4(address)
        if inner is not None:
            return is_public(inner)
        if any(address in network for network in _HIDDEN_FORMS):
            return False
    elif any(address in network for network in _SPECIAL_IPV4):
        return False
    return address.is_global and not (
        address.is_private
        or address.is_multicast
        or address.is_reserved
        or address.is_loopback
        or address.is_link_local
        or address.is_unspecified
    )


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _SIX_TO_FOUR:
        return address.sixtofour
    return None
