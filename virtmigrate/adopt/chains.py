# SPDX-License-Identifier: Apache-2.0
"""The chains of a domain's disks: from its XML, or as the operator says."""

from virtmigrate import domainxml
from virtmigrate.adopt import values
from virtmigrate.formats import DiskFormat

Chain = tuple[domainxml.Layer, ...]


class Chains:
    """Reads all chains of a domain; what is left open or contradicts is a problem.

    One use, one thread.
    """

    def __init__(self, found: domainxml.FoundDomain, given: values.Given) -> None:
        self.problems: list[str] = []
        self._given = given
        self.chains: dict[str, Chain] = {
            disk.target: self._chain(disk) for disk in found.disks if disk.chain
        }
        self._check_given(found)

    # Private

    def _chain(self, disk: domainxml.FoundDisk) -> Chain:
        given = self._given.chains.get(disk.target)
        if given is not None:
            self._check_chain(disk, given)
            return given
        hint = f" (say it with --disk {disk.target}=FORMAT:PATH,...)"
        self.problems += [problem + hint for problem in disk.problems]
        return () if disk.problems else disk.layers()

    def _check_chain(self, disk: domainxml.FoundDisk, given: Chain) -> None:
        """See that what the operator says does not contradict the XML."""
        if len(given) < len(disk.chain):
            self.problems.append(
                f"disk {disk.target}: the XML names {len(disk.chain)} layers, and "
                f"--disk only {len(given)}"
            )
        for said, found in zip(given, disk.chain, strict=False):
            if said.source != found.source or found.fmt not in (None, said.fmt):
                fmt = found.fmt.value if found.fmt else "no format"
                self.problems.append(
                    f"disk {disk.target}: --disk says {said.source} as "
                    f"{said.fmt.value}, and the XML {found.source} as {fmt}"
                )
        if len(given) > len(disk.chain) and disk.terminated:
            self.problems.append(
                f"disk {disk.target}: the XML says that nothing is behind "
                f"{disk.chain[-1].source}"
            )
        for said in given[:-1]:
            if said.fmt is DiskFormat.RAW:
                self.problems.append(
                    f"disk {disk.target}: {said.source} is raw and has no backing layer"
                )

    def _check_given(self, found: domainxml.FoundDomain) -> None:
        targets = {disk.target for disk in found.disks if disk.chain}
        for target in self._given.chains:
            if target not in targets:
                self.problems.append(f"--disk {target}: the domain has no such disk")
        formats = {
            values.label(target, depth): layer.fmt
            for target, chain in self.chains.items()
            for depth, layer in enumerate(chain)
        }
        for each in self._given.sizes:
            if formats.get(each) is DiskFormat.RAW:
                self.problems.append(f"--size {each}: it is raw, its file is measured")
            elif each not in formats and each.partition("[")[0] not in targets:
                self.problems.append(f"--size {each}: the domain has no such disk")
