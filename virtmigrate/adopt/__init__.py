# SPDX-License-Identifier: Apache-2.0
"""Records for a domain that something else made.

What is recorded comes from the domain's inactive XML, where it names formats and
chains, or from the operator; never from headers, which a guest may have written.

Steps, in this order, each of which can be run twice:

    pools       over directories that no pool of the host covers
    volumes     a record each, the lowest layer first
    domain      its XML names the full chains, and us in its metadata
    instance    its record; with it the instance is ours

A failure undoes them. A killed run leaves records without an instance: adopting
again takes them over. The files themselves are never touched.
"""

from oslo_log import log as logging

from virtmigrate import node
from virtmigrate.adopt import planner, runner
from virtmigrate.adopt.values import Adoption, AdoptionRefused, Given, Planned
from virtmigrate.rollback import Rollback

LOG = logging.getLogger(__name__)

__all__ = ["Adoption", "AdoptionRefused", "Given", "Planned", "plan", "run"]


def plan(here: node.Node, uuid: str, given: Given) -> Adoption:
    """Return what would be done; touch nothing.

    Raises AdoptionRefused with all that is left open, InstanceExists when it has a
    record, InstanceNotFound.
    """
    return planner.Planner(here, uuid, given).plan()


def run(here: node.Node, uuid: str, given: Given) -> Adoption:
    """Adopt the domain and return what was done.

    Raises as `plan` does. On failure all is as it was.
    """
    with here.claimed(uuid):
        planned = plan(here, uuid, given)
        with Rollback() as undo:
            done = runner.Run(here, planned, undo).run()
            undo.commit()
    LOG.info("instance=%s adopted on %s", uuid, here.name)
    return done
