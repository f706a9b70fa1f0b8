# SPDX-License-Identifier: Apache-2.0
"""Clones kept off every network, and let onto theirs.

A restored guest sends at once: QEMU announces it before its CPUs run, and the link's
state comes with the memory, whatever its XML says. So a clone is restored into an
isolated network of libvirt, whose ports do not see each other either: no frame of it
reaches anything. Its link is set down before its CPUs run. Going onto the network is
libvirt moving the port to another bridge, then the link up.
"""

from collections.abc import Sequence

import libvirt
from oslo_log import log as logging

from virtmigrate import domainxml, errors, translation, xml
from virtmigrate.clone import configuration
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)

_ISOLATED = ("name", "uuid", "bridge", "mac", "port")
"""What the description of a network without any way out has."""


class Apart:
    """The isolated network of one host. Safe to share between threads.

    Arguments:
        network: its name.
    """

    def __init__(self, host: Host, network: str) -> None:
        self._host = host
        self.network = network

    def ensure(self) -> None:
        """Have the network; ConfigurationError when one of its name leads anywhere."""
        with self._host.session(f"making network {self.network}") as session:
            found = self._find(session.conn)
            if found is None:
                found = session.conn.networkDefineXML(self._definition())
                # For clones that stay in it, when the host starts anew.
                found.setAutostart(1)
            if not found.isActive():
                found.create()
            self._demand_isolated(found.XMLDesc(0))

    def hold(self, uuid: str) -> None:
        """Set the links of a clone down, whose CPUs do not run."""
        self._update(uuid, ())

    def release(self, uuid: str, interfaces: Sequence[domainxml.Interface]) -> None:
        """Plug a running clone into its networks, and set its links up."""
        self._update(uuid, interfaces)

    # Private

    def _update(self, uuid: str, ends: Sequence[domainxml.Interface]) -> None:
        """Change interfaces of a running domain; without ends all links go down."""
        wanted = {each.mac.lower(): each for each in ends}
        with self._host.session(
            f"instance {uuid}: changing its links", instance=uuid
        ) as session:
            domain = session.conn.lookupByUUIDString(uuid)
            text = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
            for found in domainxml.interfaces(text):
                end = wanted.get(found.mac)
                if end is not None or not wanted:
                    element = configuration.device(text, found.mac, end)
                    live = libvirt.VIR_DOMAIN_AFFECT_LIVE
                    domain.updateDeviceFlags(element, live)

    def _find(self, conn: "libvirt.virConnect") -> "libvirt.virNetwork | None":
        try:
            return conn.networkLookupByName(self.network)
        except libvirt.libvirtError as e:
            if translation.code(e) != libvirt.VIR_ERR_NO_NETWORK:
                raise
            return None

    def _definition(self) -> str:
        root = xml.element("network")
        xml.add(root, "name", self.network)
        xml.add(root, "bridge", stp="off", delay="0")
        xml.add(root, "port", isolated="yes")
        return xml.write(root)

    def _demand_isolated(self, text: str) -> None:
        root = xml.parse(text)
        strange = {xml.tag_of(each) for each in xml.children(root)} - set(_ISOLATED)
        if strange or xml.attribute_at(root, "port", "isolated") != "yes":
            raise errors.ConfigurationError(
                reason=f"host {self._host.name}: the network {self.network} is not "
                "isolated, so clones cannot be kept apart in it: remove it, or set "
                "clone_apart_network to another name"
            )
