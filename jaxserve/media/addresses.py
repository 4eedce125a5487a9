"""Which network addresses strangers may make this server connect to."""

from __future__ import annotations

import ipaddress

# Each of these leads to an IPv4 address inside of it, which a gateway nearby may know: NAT64, 6to4.
_EMBEDDING = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: not private, local, shared, reserved or multicast.

    An IPv4 address written as IPv6 (::ffff:10.0.0.1) is judged as itself.  What is no IP address is not public.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.is_site_local or any(ip in network for network in _EMBEDDING):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)
