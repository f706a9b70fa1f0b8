# SPDX-License-Identifier: Apache-2.0
"""What all commands share: a session, errors as exit codes, common options."""

import argparse
from typing import Any

import cliff.command
import cliff.lister
import cliff.show

from virtmigrate import errors
from virtmigrate.cli import outcome, session


class _Coded(cliff.command.Command):
    """A command whose errors are one message and an exit code."""

    code = outcome.Outcome.DONE
    """What run() returns when nothing was raised."""

    def open(self) -> session.Session:
        """Return the session of this command."""
        return session.Session(self.app.options.config_file)

    def run(self, parsed_args: argparse.Namespace) -> int:
        try:
            return int(super().run(parsed_args) or self.code)
        except (errors.Error, errors.Cancelled) as e:
            return outcome.tell(e, debug=self.app.options.debug)


class ShowOne(_Coded, cliff.show.ShowOne):
    """A command with one result."""


class Lister(_Coded, cliff.lister.Lister):
    """A command with a table."""


class Plain(_Coded):
    """A command without a result."""


def add_instance(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names an instance."""
    parser.add_argument("instance", metavar="INSTANCE", help="its UUID or name")


def add_override(parser: argparse.ArgumentParser) -> None:
    """Add the option that acts on another service's instance."""
    parser.add_argument(
        "--unmanaged-override",
        action="store_true",
        help="act on an instance that belongs to a compute service, which will not "
        "know of it; this is logged",
    )


def columns(values: dict[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Return a dict as cliff's ShowOne takes it."""
    return tuple(values), tuple(values.values())
