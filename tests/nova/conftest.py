# SPDX-License-Identifier: Apache-2.0
"""Nova with this driver, on two real libvirt hosts.

Runs in the environment that tools/setup-nova makes; in another one nothing here is
collected.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator

import pytest

# Native threads, as Nova runs from now on; before anything of Nova is imported.
os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "True")

collect_ignore_glob: list[str] = []
try:
    found = importlib.util.find_spec("nova.virt.driver")
except ImportError:
    found = None
if found is None:
    collect_ignore_glob = ["*.py"]
else:
    warnings.simplefilter("ignore")
    # First of all: it decides on threads, and eventlet is forbidden from then on.
    importlib.import_module("nova.tests.functional")
    # Before fixtures of Nova take libvirt's place, and forbid to ask for the machine.
    import inotify_simple
    import libvirt  # noqa: F401

    from sandbox import Host, Sandbox
    from tests.nova import sites

    # It asks for the machine when it is first used.
    inotify_simple.INotify().close()

    @pytest.fixture(scope="session")
    def hosts() -> Iterator[dict[str, Host]]:
        box = Sandbox.attach()
        names = ("alpha", "beta")
        yield {name: box.add_host(name) for name in names}
        for name in names:
            box.remove_host(name)

    @pytest.fixture
    def empty_hosts(
        request: pytest.FixtureRequest, hosts: dict[str, Host]
    ) -> Iterator[None]:
        """Each test finds its hosts empty, and leaves them so."""
        tmp = request.getfixturevalue("tmp_path")
        made = sites.Sites(hosts, tmp)
        request.instance.places = made
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "virtmigrate.nova_plugin.base.Base.configuration",
                lambda _, host: made.site(host).conf(),
            )
            try:
                yield
            finally:
                made.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    # Beside tests/functional, that one has it already.
    with contextlib.suppress(ValueError):
        parser.addoption("--full", action="store_true", help="run the long ones, too")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave the long ones out, unless --full."""
    if config.getoption("--full"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: run with --full only")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what Nova called of the driver."""
    cloud = sys.modules.get("tests.nova.cloud")
    called = sorted(cloud.CALLED) if cloud else ()
    if called:
        terminalreporter.write_line(
            f"Nova called {len(called)} methods of the driver: {', '.join(called)}"
        )
