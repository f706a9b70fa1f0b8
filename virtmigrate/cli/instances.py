# SPDX-License-Identifier: Apache-2.0
"""Finding an instance by what a person calls it, and whom it belongs to."""

from oslo_log import log as logging

from virtmigrate import census, errors, model, node

LOG = logging.getLogger(__name__)

OWNER = "virtmigrate"
"""Whom instances belong to that no compute service manages."""

# What the service's own commands are called, by owner and verb.
_COMMANDS = {
    "nova": {
        "migrate": "openstack server migrate {uuid}",
        "resize": "openstack server resize --flavor FLAVOR {uuid}",
        "confirm": "openstack server resize confirm {uuid}",
        "revert": "openstack server resize revert {uuid}",
    }
}


def find(here: node.Node, called: str) -> model.Instance:
    """Return the record of an instance by UUID or name.

    Raises InstanceNotFound, InstanceError when the name is several instances',
    RecordMissing when it has a domain and no record.
    """
    uuid = find_uuid(here, called)
    return here.instances.read(uuid).body


def find_uuid(here: node.Node, called: str) -> str:
    """Return the UUID of an instance or domain; it may have no record."""
    named = dict(here.domains.all())
    named |= {uuid: record.name for uuid, record in census.records(here).items()}
    if called.lower() in named:
        return called.lower()
    matches = [uuid for uuid, name in named.items() if name == called]
    if not matches:
        raise errors.InstanceNotFound(instance=called, host=here.name)
    if len(matches) > 1:
        raise errors.InstanceError(
            instance=called,
            host=here.name,
            reason=f"{len(matches)} have this name ({', '.join(matches)}): give a UUID",
        )
    return matches[0]


def demand_ours(record: model.Instance, verb: str, *, override: bool) -> None:
    """Raise OwnedElsewhere when another service manages the instance.

    Arguments:
        verb: migrate, resize, confirm or revert.
        override: go on all the same, and say so.
    """
    if record.owner == OWNER:
        return
    if not override:
        raise errors.OwnedElsewhere(
            instance=record.uuid,
            owner=record.owner,
            command=command(record.owner, verb, record.uuid),
        )
    LOG.warning(
        "instance=%s belongs to %s, and %s goes on without it: --unmanaged-override",
        record.uuid,
        record.owner,
        verb,
    )


def command(owner: str, verb: str, uuid: str) -> str:
    """Return the service's own command for a verb."""
    template = _COMMANDS.get(owner, {}).get(verb, f"{owner}'s way to {verb} {{uuid}}")
    return template.format(uuid=uuid)
