"""Which addresses are public."""

import pytest

from pgbackend.serve.egress.addresses import is_public


@pytest.mark.parametrize(
    "host",
    [
        "93.184.215.14",
        "8.8.8.8",
        "172.15.255.255",
        "172.32.0.0",
        "192.167.255.255",
        "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
        "::ffff:8.8.8.8",  # IPv6 forms of public addresses
        "64:ff9b::8.8.8.8",
        "2002:808:808::1",
    ],
)
def test_public_addresses_are_public(host: str) -> None:
    assert is_public(host)


@pytest.mark.parametrize(
    "host",
    [
        # private, loopback, link-local, unspecified, multicast, reserved
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.1.1",
        "0.0.0.0",  # noqa: S104 - an address to refuse
        "0.1.2.3",
        "100.64.0.1",  # carrier-grade NAT, and the pods of many clusters
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "fd12:3456::1",
        "ff02::1",
        "2001:db8::1",
        "4000::1",  # not assigned
        # metadata of AWS, GCP and Azure; Alibaba; AWS by IPv6; Oracle; Azure's platform
        "169.254.169.254",
        "100.100.100.200",
        "fd00:ec2::254",
        "192.0.0.192",
        "168.63.129.16",
        # IPv6 forms of such addresses: mapped, translated, NAT64, local NAT64, compatible, 6to4, Teredo
        "::ffff:127.0.0.1",
        "::ffff:7f00:1",
        "::ffff:169.254.169.254",
        "::ffff:0:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::8.8.8.8",
        "::127.0.0.1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2002:a9fe:a9fe::1",
        "2001:0:7f00:1::1",
        # texts that only some programs take for an address
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "",
        "8.8.8.8 ",
    ],
)
def test_other_addresses_are_not_public(host: str) -> None:
    assert not is_public(host)
