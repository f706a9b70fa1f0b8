# SPDX-License-Identifier: Apache-2.0
"""Real guests of one memory image, made somebody else by their real agents.

That they are one and the same before is shown, too: else nothing would be proven.
"""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import msgspec
import pytest

from sandbox import Host as SandboxHost
from sandbox import identityimage, imagebuild
from tests.functional import killed_identity
from tests.functional.twins import (
    Twin,
    Twins,
    dhcp,
    expect_no_value_twice,
    expect_served,
    wait_for,
)
from virtmigrate import errors, identity
from virtmigrate.identity import changing, steps
from virtmigrate.identity.guest import Timed

LIMITS = identity.Limits(step=90.0, whole=600.0, hook=60.0)
SEED = 20
POINTS = 3
"""Chooses the points that a change is killed at; --full takes all of them."""
HEX = "hexdump -v -e '/1 \"%02x\"'"
DRAW = f"dd if=/dev/urandom bs=32 count=1 2>/dev/null | {HEX}"
"""One program that draws: the first bytes after whatever was before."""


@contextlib.contextmanager
def guests(host: SandboxHost, *, network: bool) -> Iterator[Twins]:
    twins = Twins(host, identityimage.image(), network=network)
    try:
        yield twins
    finally:
        twins.close()


@pytest.fixture(scope="module")
def server(
    pair: tuple[SandboxHost, SandboxHost], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """A DHCP server on the bridge."""
    with dhcp(pair[0], tmp_path_factory.mktemp("dhcp")):
        yield


@pytest.fixture(scope="module")
def source(
    pair: tuple[SandboxHost, SandboxHost], server: None
) -> Iterator[tuple[Twins, identity.Identities]]:
    """A source that was saved, and who it was."""
    with guests(pair[0], network=True) as twins:
        twin = twins.start()
        wait_for(lambda: twin.said("LEASE"))
        assert identity.obstacles(twin.agent(), timeout=120) == []
        # A clock that stood still while the image lay on a disk.
        twin.sh("date -u -s @1000000000")
        found = identity.read(twin.agent(), timeout=120)
        twins.save()
        yield twins, found


@pytest.fixture
def clone(source: tuple[Twins, identity.Identities]) -> Iterator[Twin]:
    twins, _ = source
    twin = twins.restore()
    yield twin
    with contextlib.suppress(Exception):
        twins.domain(twin).destroy()


def wanted(source: Twin, clone: Twin, name: str = "other") -> identity.Wanted:
    interface = identity.Interface(source.mac, clone.mac)
    return identity.Wanted(name=name, uuid=clone.uuid, interfaces=(interface,))


# The random generator


def test_without_the_step_two_draw_the_same(
    pair: tuple[SandboxHost, SandboxHost],
) -> None:
    with guests(pair[0], network=False) as twins:
        rng = steps.OURS[0]
        nobody = identity.Wanted(name="x", uuid=twins.source.uuid)
        twin = twins.start()
        # Until a while after this the guest does not reseed itself.
        rng.change(Timed(twin.agent(), 60), nobody)
        twins.save()
        # One that was slow may have reseeded itself: then another is as good.
        draws: list[str] = []
        while len(set(draws)) == len(draws):
            assert len(draws) < 5, "no two of them are the same: nothing is proven"
            draws.append(drawn(twins))
        after = []
        for _ in range(2):
            how, draw = reseeded(twins)
            assert "our own program" in how
            after.append(draw)
        assert len({*draws, *after}) == len(set(draws)) + 2


def drawn(twins: Twins) -> str:
    twin = twins.restore()
    draw = twin.sh(DRAW)
    twins.domain(twin).destroy()
    return draw


def reseeded(twins: Twins) -> tuple[str, str]:
    twin = twins.restore()
    want = identity.Wanted(name="x", uuid=twin.uuid)
    how = steps.OURS[0].change(Timed(twin.agent(), 60), want)
    draw = twin.sh(DRAW)
    assert twin.sh("ls /run /tmp /root | grep virtmigrate || echo none") == "none"
    twins.domain(twin).destroy()
    return how, draw


# All of it


def test_two_clones_are_two(
    source: tuple[Twins, identity.Identities], pair: tuple[SandboxHost, SandboxHost]
) -> None:
    twins, before = source
    reports: list[identity.Report] = []
    clones: list[Twin] = []
    for number in range(2):
        twin = twins.restore()
        clones.append(twin)
        # It is the source, so far.
        same = identity.read(twin.agent(), timeout=120)
        changing_ones = ("rng", "clock")
        for name, value in before.values.items():
            assert name in changing_ones or same.values[name] == value
        counted = int(twin.sh("cat /run/count"))
        siblings = [identity.identities(report) for report in reports]
        want = wanted(twins.source, twin, f"clone-{number}")
        reports.append(
            identity.change(twin.agent(), want, before, siblings, limits=LIMITS)
        )
        assert reports[-1].ok and reports[-1].compared == number
        assert int(twin.sh("cat /run/count")) > counted, "it did not go on"
        expect_somebody_else(twin, before, want)
    expect_no_value_twice([before, *map(identity.identities, reports)])
    for twin, report in zip(clones, reports, strict=True):
        twins.link(twin, up=True)
        wait_for(functools.partial(twin.said, "LEASE"))
        expect_served(pair[0], twin.said("LEASE")[-1], report, "ed25519")
    addresses = {twin.said("LEASE")[-1] for twin in clones}
    assert len(addresses) == 2
    assert not addresses & before.group("address")
    known = pair[0].run(["bridge", "fdb", "show", "br", "br0"]).stdout
    assert all(twin.mac in known for twin in clones)
    assert twins.source.mac not in known
    for twin in clones:
        twins.domain(twin).destroy()


def expect_somebody_else(
    twin: Twin, before: identity.Identities, want: identity.Wanted
) -> None:
    """As the guest's own programs see it."""
    assert twin.sh("hostname") == want.name
    assert want.name in twin.sh("cat /etc/hosts")
    assert "origin" not in twin.sh("cat /etc/hosts /etc/hostname")
    assert twin.sh("cat /etc/machine-id") == want.uuid.replace("-", "")
    assert twin.sh("cat /var/lib/cloud/instance/../../data/instance-id") == want.uuid
    assert twin.sh("ls /var/lib/cloud/instances") == want.uuid
    assert twin.sh("cat /var/lib/cloud/instance/sem/config_ssh") == "done"
    assert twin.sh("cat /proc/sys/kernel/random/boot_id") not in before.group("boot-id")
    assert abs(int(twin.sh("date +%s")) - time.time()) < 30
    assert twin.mac in twin.sh("ip link")
    assert twin.sh("cat /sys/class/net/eth0/carrier") == "0"
    assert not twin.sh("ip -o addr show dev eth0 scope global")


def test_a_report_can_be_kept(
    source: tuple[Twins, identity.Identities], clone: Twin
) -> None:
    twins, before = source
    want = wanted(twins.source, clone)
    report = identity.change(clone.agent(), want, before, [], limits=LIMITS)
    assert identity.decode(report.encode()) == report
    told = {step.name: step for step in report.steps}
    assert [*told] == [*(step.name for step in steps.OURS), "hooks"]
    assert told["ssh"].before and told["ssh"].before != told["ssh"].after
    assert told["initiator"].state is identity.State.ABSENT
    assert "OpenSSL" in report.not_unique[0]
    # No secret is in it.
    assert "PRIVATE" not in report.encode().decode()
    # What was done can be done again, and somebody who was changed is no sibling.
    again = identity.change(clone.agent(), want, before, [], limits=LIMITS)
    assert again.ok
    mine = identity.identities(again)
    with pytest.raises(errors.IdentityFailed, match=r"step hostname: .*sibling"):
        identity.change(clone.agent(), want, before, [mine], limits=LIMITS)


# What goes wrong


def test_an_agent_that_hangs_in_each_step(
    source: tuple[Twins, identity.Identities], clone: Twin
) -> None:
    twins, before = source
    want = wanted(twins.source, clone)
    limits = identity.Limits(step=1.0, whole=60.0)
    stop_agent(clone)
    for step in steps.OURS:
        work = changing.Work(clone.agent(), want, limits, frozenset())
        with pytest.raises(errors.IdentityFailed) as caught:
            work.run([step], before, [])
        assert caught.value.details["step"] == step.name
        assert "off the network" in str(caught.value)
    # The power button wakes it.
    twins.domain(clone).shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
    wait_for(lambda: answers(clone))
    report = identity.change(clone.agent(), want, before, [], limits=LIMITS)
    assert report.ok


def stop_agent(twin: Twin) -> None:
    """Let the agent hear nothing until the guest's power button is pressed."""
    twin.sh(
        "grep -l 'Power Button' /sys/class/input/event*/device/name | head -n 1 | "
        "{ IFS=/ read -r _ _ _ _ event _; p=$(pidof qemu-ga); "
        "(sleep 0.3; kill -STOP $p; head -c 24 /dev/input/$event; kill -CONT $p) "
        ">/dev/null 2>&1 & }"
    )
    wait_for(lambda: not answers(twin))


def answers(twin: Twin) -> bool:
    try:
        return twin.agent().system(timeout=1).id == "debian"
    except errors.GuestFailed:
        return False


def test_a_killed_change_is_done_again(
    source: tuple[Twins, identity.Identities], request: pytest.FixtureRequest
) -> None:
    twins, before = source
    points = list(range(1, killed(twins, before, 0) + 1))
    if not request.config.getoption("--full"):
        points = random.Random(SEED).sample(points, POINTS)
    for point in points:
        killed(twins, before, point)


def killed(twins: Twins, before: identity.Identities, point: int) -> int:
    """Kill a change at a point, do it again; return how many points there were."""
    clone = twins.restore()
    want = wanted(twins.source, clone)
    job = msgspec.json.encode(killed_identity.Job(want, before, LIMITS))
    done = in_a_process(twins, job, point)
    if point:
        assert done.returncode == -signal.SIGKILL, done
        report = identity.change(clone.agent(), want, before, [], limits=LIMITS)
        assert report.ok
    expect_somebody_else(clone, before, want)
    assert clone.sh("pidof dropbear udhcpc | wc -w") == "2"
    twins.domain(clone).destroy()
    return int(done.stdout or 0)


def in_a_process(
    twins: Twins, job: bytes, point: int
) -> subprocess.CompletedProcess[bytes]:
    name = "tests.functional.killed_identity"
    argv = [sys.executable, "-m", name, twins.host.uri, str(point)]
    return subprocess.run(argv, input=job, capture_output=True, timeout=300)


def test_hooks_run_and_are_killed(
    source: tuple[Twins, identity.Identities], clone: Twin
) -> None:
    twins, before = source
    want = wanted(twins.source, clone)
    hook(clone, "10-note", 'echo "$1 $(hostname)" >>/run/told')
    hook(clone, "20-slow", "sleep 1000; sleep 1001")
    limits = identity.Limits(step=90.0, whole=600.0, hook=1.0)
    with pytest.raises(errors.IdentityFailed, match=r"step hooks: .*20-slow") as caught:
        identity.change(clone.agent(), want, before, [], limits=limits)
    assert "address" in str(caught.value.details["state"])
    # Its random generator was reseeded before anything could fail.
    assert str(caught.value.details["state"]).index("rng") > 0
    wait_for(lambda: "sleep 100" not in clone.sh("ps"))
    risk = frozenset({"hooks"})
    report = identity.change(clone.agent(), want, before, [], limits=limits, risk=risk)
    assert not report.ok and report.unproven == ("hooks",)
    assert report.steps[-1].state is identity.State.FAILED
    clone.sh("rm /etc/virtmigrate/clone.d/20-slow")
    moment = identity.Moment.CONNECTED
    assert identity.tell(clone.agent(), moment, limits=LIMITS) == ("10-note",)
    told = clone.sh("cat /run/told").splitlines()
    assert told == ["clone other", "clone other", "connected other"]


def test_a_static_address_is_found(
    source: tuple[Twins, identity.Identities], clone: Twin
) -> None:
    twins, before = source
    (address,) = before.group("address")
    # As a guest does whose own configuration names its address.
    hook(clone, "10-static", f"ip addr add {address}/24 dev eth0")
    want = wanted(twins.source, clone)
    with pytest.raises(errors.IdentityFailed, match=rf"step address: .*{address}"):
        identity.change(clone.agent(), want, before, [], limits=LIMITS)
    risk = frozenset({"address"})
    clone.sh(f"ip addr del {address}/24 dev eth0")
    report = identity.change(clone.agent(), want, before, [], limits=LIMITS, risk=risk)
    assert not report.ok and report.unproven == ("address",)


def hook(twin: Twin, name: str, script: str) -> None:
    path = f"/etc/virtmigrate/clone.d/{name}"
    twin.sh("mkdir -p /etc/virtmigrate/clone.d")
    twin.agent().write(path, f"#!/bin/sh\n{script}\n".encode(), 0o755, timeout=60)


def test_files_are_whole_or_not_there(
    source: tuple[Twins, identity.Identities], clone: Twin
) -> None:
    agent = clone.agent()
    data = bytes(range(256)) * 300
    agent.write("/run/it", data, 0o640, timeout=60)
    assert agent.read("/run/it", len(data), timeout=60) == data
    assert clone.sh("stat -c %a /run/it") == "640"
    assert agent.read("/run/none", 10, timeout=60) is None
    with pytest.raises(errors.GuestFailed, match="more than 10 bytes"):
        agent.read("/run/it", 10, timeout=60)
    with pytest.raises(errors.GuestFailed):
        agent.write("/none/it", b"x", 0o600, timeout=60)
    with pytest.raises(errors.GuestFailed, match=r"too much|too long"):
        agent.run(["/bin/dd", "if=/dev/zero", "bs=1M", "count=1"], timeout=60)
    # What waits for ever is killed, and the agent is there for the next one.
    with pytest.raises(errors.GuestFailed, match="killed"):
        clone.sh("mkfifo /run/fifo; exec cat /run/fifo", timeout=2)
    assert clone.sh("echo here") == "here"


def test_what_is_not_proven_is_told(
    source: tuple[Twins, identity.Identities], clone: Twin
) -> None:
    agent = clone.agent()

    def told() -> list[str]:
        return identity.obstacles(agent, timeout=120)

    assert told() == []
    assert identity.obstacles(agent, timeout=120, proven=["debian-11"]) == [
        "system: Debian GNU/Linux (debian-12): the steps are proven on debian-11"
    ]
    clone.sh("mv /usr/bin/dropbearkey /run/; cp /bin/busybox /run/dhclient")
    clone.sh("/bin/sh -c 'exec -a dhclient sleep 100' >/dev/null 2>&1 & :")
    assert any(line.startswith("ssh: no dropbearkey") for line in told())
    with pytest.raises(errors.IdentityFailed, match="step ssh"):
        want = wanted(source[0].source, clone)
        identity.change(agent, want, source[1], [], limits=LIMITS)
    restart_agent(clone, "-b guest-exec")
    wait_for(lambda: answers(clone))
    assert [line.partition(":")[0] for line in told()] == ["agent"]
    assert "runs no commands" in told()[0]


def restart_agent(twin: Twin, arguments: str) -> None:
    start = (
        "qemu-ga --daemonize -m virtio-serial -p $(ls -d /dev/vport* | head -1) "
        f"-t /run {arguments}"
    )
    twin.sh(f"(sleep 0.5; kill $(pidof qemu-ga); sleep 0.5; {start}) >/dev/null 2>&1 &")
    time.sleep(2.0)


def test_without_an_agent_it_is_refused(
    source: tuple[Twins, identity.Identities], clone: Twin
) -> None:
    clone.sh("(sleep 0.3; kill -9 $(pidof qemu-ga)) >/dev/null 2>&1 &")

    def told() -> list[str]:
        return identity.obstacles(clone.agent(), timeout=3)

    wait_for(told)
    assert [line.partition(":")[0] for line in told()] == ["agent"]
    want = wanted(source[0].source, clone)
    limits = identity.Limits(step=2.0)
    with pytest.raises(errors.IdentityFailed, match="step rng"):
        identity.change(clone.agent(), want, source[1], [], limits=limits)


def test_the_image_is_not_the_other_one() -> None:
    """Tests that need no identity boot as fast as before."""
    assert identityimage.INIT != imagebuild.INIT
    assert Path(identityimage.image().path).stat().st_size == imagebuild.SIZE
