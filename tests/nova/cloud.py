# SPDX-License-Identifier: Apache-2.0
"""Nova in one process: API, conductor, scheduler, placement, and two computes."""

import re
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nova.tests import fixtures as nova_fixtures
from nova.tests.functional import integrated_helpers
from nova.virt import driver as nova_driver

from sandbox import guest
from tests.nova import images, sites
from virtmigrate.nova_plugin.driver import VirtMigrateDriver

DOCS = (Path(__file__).parents[2] / "docs/nova.md").read_text()
CALLED: set[str] = set()
"""What Nova called in all tests."""
Base: Any = integrated_helpers.ProviderUsageBaseTestCase
TIMEOUT = 180.0
"""Seconds: the machine may have much else to do."""
NETWORKS = "none"


class Cloud(Base):
    """A cloud whose computes are `alpha` and `beta`, each on a libvirt of its own.

    Its only fakes are Nova's: of the image service, Neutron and Cinder.
    """

    compute_driver = "virtmigrate.VirtMigrateDriver"
    places: sites.Sites

    def setUp(self) -> None:
        paste = f"{sys.prefix}/etc/nova/api-paste.ini"
        real = nova_fixtures.GlanceFixture
        nova_fixtures.GlanceFixture = images.Images
        self.addCleanup(setattr, nova_fixtures, "GlanceFixture", real)
        self.flags(api_paste_config=paste, group="wsgi")
        # The guest does not listen: it is turned off at once.
        self.flags(shutdown_timeout=0)
        super().setUp()
        self.called: dict[str, list[BaseException | None]] = {}
        self._trace()
        self.addCleanup(self._expect_named)
        self._identify()
        self.alpha, self.beta = self.places.site("alpha"), self.places.site("beta")
        for name in ("alpha", "beta"):
            driver = self._start_compute(name).manager.driver
            self.addCleanup(driver.cleanup_host, name)
        self.small = self.flavor("small", memory_mb=128, root_gb=1)

    def _clear_attrs(self) -> None:
        """pytest still needs them."""

    # What is asked of Nova

    def flavor(self, name: str, specs: dict[str, str] | None = None, **of: int) -> str:
        """Make a flavor; return its id."""
        body = {"id": name, "name": name, "vcpus": 1, "ram": of["memory_mb"]}
        body |= {"disk": of.get("root_gb", 1), "swap": of.get("swap", 0)}
        body["OS-FLV-EXT-DATA:ephemeral"] = of.get("ephemeral_gb", 0)
        self.admin_api.post_flavor({"flavor": body})
        if specs:
            self.admin_api.post_extra_spec(name, {"extra_specs": specs})
        return name

    def create(self, host: str = "alpha", **more: Any) -> Any:
        """Ask for a server; return it as it is then."""
        body = {
            "name": "guest",
            "imageRef": images.GUEST,
            "flavorRef": self.small,
            "networks": NETWORKS,
            "availability_zone": f"nova:{host}",
            **more,
        }
        return self.admin_api.post_server({"server": body})

    def boot(self, host: str = "alpha", **more: Any) -> Any:
        """Return a server that is ACTIVE."""
        return self.wait(self.create(host, **more), "ACTIVE")

    def act(self, server: Any, action: str, **body: Any) -> None:
        self.admin_api.post_server_action(server["id"], {action: body or None})

    def wait(self, server: Any, status: str) -> Any:
        """Return a server once it has a status and nothing is done with it."""

        def there() -> Any:
            found = self.admin_api.get_server(server["id"])
            busy = found["OS-EXT-STS:task_state"] is not None
            if found["status"] == "ERROR" != status and not busy:
                raise AssertionError(f"it is in ERROR: {found.get('fault')}")
            if status == "VERIFY_RESIZE" and not busy:
                raised = self.called.get("migrate_disk_and_power_off", [None])[-1]
                assert raised is None, repr(raised)
            return found if found["status"] == status and not busy else None

        return until(there)

    def wait_until_gone(self, server: Any) -> None:
        def gone() -> bool:
            found = self.admin_api.get_servers(search_opts={"all_tenants": 1})
            return server["id"] not in {each["id"] for each in found}

        until(gone)

    def site_of(self, server: Any) -> sites.Site:
        return self.places.site(server["OS-EXT-SRV-ATTR:host"])

    # What is seen

    def beats(self, site: sites.Site, server: Any) -> int:
        """Return the number that the guest said last; wait until it said one."""
        log = self.log(site, server)
        found = until(lambda: log.exists() and guest.beats(log))
        return int(found[-1].number)

    def log(self, site: sites.Site, server: Any) -> Path:
        return site.console / f"virtmigrate-{server['id']}.log"

    def expect_one(self, server: Any, here: sites.Site) -> None:
        """One domain, and volumes on one host only."""
        there = self.beta if here is self.alpha else self.alpha
        assert here.state_of(server["id"]) is not None
        assert there.state_of(server["id"]) is None
        assert not there.disks()

    def wait_for_migration(self, server: Any, status: str) -> None:
        def found() -> bool:
            moves = self.admin_api.api_get("os-migrations").body["migrations"]
            return any(
                each["instance_uuid"] == server["id"] and each["status"] == status
                for each in moves
            )

        until(found)

    # Private

    def _identify(self) -> None:
        """Nova has one identity for a process, and here are two computes in it."""
        resources = VirtMigrateDriver.get_available_resource

        def resources_of(driver: Any, nodename: str) -> Any:
            return {**resources(driver, nodename), "uuid": identity(nodename)}

        def nodes_of(driver: Any, refresh: bool = False) -> Any:
            return {identity(name): name for name in driver.get_available_nodes()}

        path = "virtmigrate.nova_plugin.driver.VirtMigrateDriver"
        self.stub_out(f"{path}.get_available_resource", resources_of)
        self.stub_out(f"{path}.get_nodenames_by_uuid", nodes_of)

    # What was asked of the driver

    def _trace(self) -> None:
        """Note each method that Nova calls, and what it raised."""
        for name in dir(nova_driver.ComputeDriver):
            method = getattr(VirtMigrateDriver, name)
            if callable(method) and not name.startswith("_"):
                self.stub_out(
                    f"virtmigrate.nova_plugin.driver.VirtMigrateDriver.{name}",
                    self._traced(name, method),
                )

    def _expect_named(self) -> None:
        """What Nova asked for and is not there is what the page says."""
        missing = {
            name
            for name, raised in self.called.items()
            if any(isinstance(each, NotImplementedError) for each in raised)
        }
        named = set(
            re.findall(
                r"^\| `(\w+)` \| refused \| NotImplementedError", DOCS, re.MULTILINE
            )
        )
        assert missing <= named, missing - named
        CALLED.update(self.called)

    def _traced(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            noted = self.called.setdefault(name, [])
            try:
                result = method(*args, **kwargs)
            except BaseException as e:
                noted.append(e)
                raise
            noted.append(None)
            return result

        return call


def identity(nodename: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, nodename))


def until(found: Callable[[], Any]) -> Any:
    """Return what is found in the end; AssertionError after a long while."""
    deadline = time.monotonic() + TIMEOUT
    while not (result := found()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.2)
    return result
