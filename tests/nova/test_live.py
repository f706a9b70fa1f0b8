# SPDX-License-Identifier: Apache-2.0
"""Live migrations by Nova's API, of guests that count."""

import itertools
from typing import Any

import pytest

from sandbox import guest
from tests.nova import cloud
from virtmigrate import errors

pytestmark = pytest.mark.usefixtures("empty_hosts")


class Live(cloud.Cloud):
    """What all of them ask and look at."""

    bandwidth = 0
    """MiB per second; 0: no limit."""

    def setUp(self) -> None:
        for name in ("alpha", "beta"):
            self.places.site(name).overrides["live_bandwidth_mib"] = self.bandwidth
        super().setUp()

    def going(self, server: Any) -> int:
        """Return the id of its migration, once its bytes go."""
        live = self.computes["alpha"].manager.driver.core.live
        cloud.until(lambda: (found := live.status(server["id"])) and found.processed)
        (migration,) = self.admin_api.get_active_migrations(server["id"])
        return int(migration["id"])

    def migrate(self, server: Any, **more: Any) -> None:
        body = {"host": None, "block_migration": "auto", **more}
        self.act(server, "os-migrateLive", **body)

    def expect_at(self, server: Any, name: str) -> None:
        """ACTIVE there and nowhere else, and no beat was lost or doubled."""
        found = self.wait(server, "ACTIVE")
        assert found["OS-EXT-SRV-ATTR:host"] == name
        here = self.places.site(name)
        self.expect_one(server, here)
        assert here.state_of(server["id"]) == "running"
        log = self.log(here, server)
        now = len(guest.beats(log))
        cloud.until(lambda: len(guest.beats(log)) > now + 1)
        beats = [each.number for each in guest.beats(log)]
        assert all(b == a + 1 for a, b in itertools.pairwise(beats)), beats
        assert len(guest.boots(log)) == 1

    def expect_nothing_awaited(self) -> None:
        for site in (self.alpha, self.beta):
            assert not list((site.state / "awaited").glob("*"))
            driver = self.computes[site.host.name].manager.driver
            assert driver.core.settle() == []


class TestLive(Live):
    """As fast as it goes."""

    def test_goes_on_at_the_other_host(self) -> None:
        """Whoever is not awaited is not taken: Nova said so by pre_live_migration."""
        server = self.boot()
        self.beats(self.alpha, server)
        self.migrate(server)
        self.wait_for_migration(server, "completed")
        self.expect_at(server, "beta")
        self.expect_nothing_awaited()
        assert self.called["cleanup"] == [None]
        self.act(server, "pause")
        self.wait(server, "PAUSED")

    def test_fails_and_stays(self) -> None:
        """The server is ACTIVE at its source, where its guest runs on."""
        server = self.boot()
        self.beats(self.alpha, server)

        def fail(*_: Any) -> None:
            raise errors.MigrationError(instance="i", operation="o", reason="injected")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("virtmigrate.livemigration.steering.Steering.run", fail)
            self.migrate(server)
            self.wait_for_migration(server, "failed")
        self.expect_at(server, "alpha")
        self.expect_nothing_awaited()
        assert self.called["live_migration"] == [None]

    def test_refused_by_the_check(self) -> None:
        """A config drive does not go live: nothing was begun."""
        server = self.boot(config_drive=True)
        self.beats(self.alpha, server)
        self.migrate(server)
        self.wait_for_migration(server, "error")
        self.expect_at(server, "alpha")
        raised = self.called["check_can_live_migrate_source"]
        assert "sda is read-only" in str(raised)
        assert "pre_live_migration" not in self.called


class TestSlow(Live):
    """So slowly that there is time to say something."""

    bandwidth = 2

    def test_aborted(self) -> None:
        server = self.boot()
        self.beats(self.alpha, server)
        self.migrate(server)
        self.admin_api.delete_migration(server["id"], self.going(server))
        self.wait_for_migration(server, "cancelled")
        self.expect_at(server, "alpha")
        self.expect_nothing_awaited()


class TestForced(Live):
    """As slowly as can be waited for: of a disk all its zeros count."""

    bandwidth = 64

    @pytest.mark.long
    def test_forced(self) -> None:
        """It stands still until it is there, and then goes on."""
        server = self.boot()
        self.beats(self.alpha, server)
        self.migrate(server)
        self.admin_api.force_complete_migration(server["id"], self.going(server))
        cloud.until(lambda: self.alpha.state_of(server["id"]) != "running")
        self.wait_for_migration(server, "completed")
        self.expect_at(server, "beta")
