# SPDX-License-Identifier: Apache-2.0
"""Whether a running guest can go on under the peer's QEMU, and why not."""

import libvirt

from virtmigrate import domainxml, xml
from virtmigrate.host import Host


def obstacles(here: Host, there: Host, live: str) -> list[str]:
    """Return why the peer cannot go on with a guest; nothing when it can.

    Arguments:
        live: the configuration that it runs with.
    """
    found = []
    ours, theirs = _version(here), _version(there)
    if theirs // 1000 < ours // 1000:
        found.append(
            f"QEMU is {_said(ours)} here and {_said(theirs)} on {there.name}: a "
            "guest's state goes to the same release or a newer one"
        )
    if domainxml.virt_type(live) == "kvm" and (reason := _cpu(there, live)):
        found.append(reason)
    return found


# Private


def _version(host: Host) -> int:
    with host.session("asking for its version") as session:
        return int(session.conn.getVersion())


def _said(version: int) -> str:
    return f"{version // 1000000}.{version // 1000 % 1000}"


def _cpu(there: Host, live: str) -> str | None:
    """Return why the peer's CPU is none for the guest."""
    element = xml.parse(live).find("cpu")
    if element is None:
        return None
    arch, machine = domainxml.arch(live), domainxml.machine(live)
    with there.session("comparing CPUs") as session:
        try:
            session.conn.compareHypervisorCPU(
                None,
                arch,
                machine,
                domainxml.virt_type(live),
                xml.write(element),
                libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE,
            )
        except libvirt.libvirtError as e:
            if e.get_error_code() != libvirt.VIR_ERR_CPU_INCOMPATIBLE:
                raise
            return f"the CPU of {there.name} lacks what the guest sees: {e}"
    return None
