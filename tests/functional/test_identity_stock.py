# SPDX-License-Identifier: Apache-2.0
"""A stock Debian, with all that runs there, is cloned and made somebody else."""

from __future__ import annotations

import functools

import libvirt
import pytest

from sandbox import Host as SandboxHost
from sandbox import guest, stockimage
from tests.functional.twins import (
    Twin,
    Twins,
    dhcp,
    expect_no_value_twice,
    expect_served,
    wait_for,
)
from virtmigrate import identity
from virtmigrate.identity import steps
from virtmigrate.identity.guest import Timed

# A key of RSA takes its time under emulation.
LIMITS = identity.Limits(step=240.0, whole=900.0, steps={"ssh": 400.0})


@pytest.fixture(autouse=True)
def only_in_full(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("minutes under emulation: with --full")


@pytest.mark.timeout(1500)
def test_a_stock_debian_becomes_two(
    pair: tuple[SandboxHost, SandboxHost], tmp_path_factory: pytest.TempPathFactory
) -> None:
    stock = stockimage.build()
    boot = (
        f"<kernel>{stock.kernel}</kernel><initrd>{stock.initrd}</initrd>"
        f"<cmdline>{stock.command_line}</cmdline>"
    )
    with dhcp(pair[0], tmp_path_factory.mktemp("dhcp")):
        twins = Twins(pair[0], guest.GuestImage(stock.disk), boot=boot)
        try:
            tried(twins, pair[0])
        finally:
            twins.close()


def tried(twins: Twins, host: SandboxHost) -> None:
    source = twins.start(memory=384, seconds=400)
    wait_for(lambda: has_lease(source), 300)
    wait_for(lambda: is_up(source), 400)
    source.sh(f"echo '# {source.mac.upper()}' >/etc/udev/rules.d/70-net.rules")
    assert identity.obstacles(source.agent(), timeout=300) == []
    before = identity.read(source.agent(), timeout=300)
    assert set(map(group, before.values)) == {step.name for step in steps.OURS}
    twins.save()
    told = [made(twins, before, [], 0)]
    told.append(made(twins, before, told, 1))
    for twin, report in told:
        twins.link(twin, up=True)
        wait_for(functools.partial(has_lease, twin), 300)
        for kind in ("ed25519", "rsa"):
            expect_served(host, lease(twin), report, kind)
    assert len({lease(twin) for twin, _ in told} | before.group("address")) == 3
    reports = [identity.identities(report) for _, report in told]
    expect_no_value_twice([before, *reports])
    goes_on_after_a_power_cut(twins, *told[0])


def made(
    twins: Twins,
    before: identity.Identities,
    siblings: list[tuple[Twin, identity.Report]],
    number: int,
) -> tuple[Twin, identity.Report]:
    twin = twins.restore()
    want = identity.Wanted(
        name=f"clone-{number}",
        uuid=twin.uuid,
        interfaces=(identity.Interface(twins.source.mac, twin.mac),),
    )
    others = [identity.identities(report) for _, report in siblings]
    report = identity.change(twin.agent(), want, before, others, limits=LIMITS)
    assert report.ok
    assert "by perl" in report.steps[0].how
    for step in report.steps:
        print(f"{step.name} {step.seconds:.1f} s {step.how}")
    assert twins.source.mac not in twin.sh("cat /etc/udev/rules.d/70-net.rules; ip l")
    assert twin.sh("hostnamectl --static") == want.name
    # Without perl there is python.
    twin.sh("mv /usr/bin/perl /usr/bin/perl-away")
    how = steps.OURS[0].change(Timed(twin.agent(), 120), want)
    assert how.endswith("by python3")
    twin.sh("mv /usr/bin/perl-away /usr/bin/perl")
    return twin, report


def goes_on_after_a_power_cut(
    twins: Twins, twin: Twin, report: identity.Report
) -> None:
    """What was changed is on its disk, and its machine has the new MAC."""
    domain = twins.domain(twin)
    xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    domain.destroy()
    twins.conn.createXML(xml)
    twins.wait_for_agent(twin, 400)
    wait_for(lambda: is_up(twin), 400)
    mine = identity.identities(report)
    after = identity.read(twin.agent(), timeout=300)
    for name in ("machine-id", "ssh", "mac", "cloud-init", "hostname", "initiator"):
        assert after.group(name) == mine.group(name)
    # Only now the guest sees its new SMBIOS.
    assert twin.sh("cat /sys/class/dmi/id/product_uuid") == twin.uuid


def group(name: str) -> str:
    return name.partition(":")[0]


def lease(twin: Twin) -> str:
    script = "ip -o -4 addr show scope global | awk '{print $4}'"
    return twin.sh(script, 120).partition("/")[0]


def has_lease(twin: Twin) -> bool:
    return bool(lease(twin))


def is_up(twin: Twin) -> bool:
    script = "systemctl is-system-running || :"
    return twin.sh(script, 120) in ("running", "degraded")
