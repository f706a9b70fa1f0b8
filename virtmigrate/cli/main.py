# SPDX-License-Identifier: Apache-2.0
"""The application: global options, logging, completion."""

import argparse
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cliff.app
import cliff.commandmanager

from virtmigrate.cli import session

NAMESPACE = "virtmigrate.cli"
DESCRIPTION = (
    "Move libvirt/QEMU instances between hosts through libvirt itself: no SSH. "
    "Exit codes: 0 done; 1 refused, or failed and put back; 2 wrong usage; "
    "3 undecided, the message says what to do; 4 cancelled and put back."
)
QUIET = ("oslo_concurrency", "stevedore", "cliff", "markdown_it")


class App(cliff.app.App):
    """The command `virtmigrate`."""

    NAME = "virtmigrate"
    LOG = logging.getLogger("virtmigrate")
    DEFAULT_VERBOSE_LEVEL = 0

    def __init__(self) -> None:
        super().__init__(
            description=DESCRIPTION,
            version=importlib.metadata.version("virtmigrate"),
            command_manager=cliff.commandmanager.CommandManager(NAMESPACE),
            deferred_help=True,
        )

    def build_option_parser(
        self,
        description: str | None,
        version: str | None,
        argparse_kwargs: dict[str, Any] | None = None,
    ) -> argparse.ArgumentParser:
        parser = super().build_option_parser(description, version, argparse_kwargs)
        named = os.environ.get(session.FILE_VARIABLE)
        parser.add_argument(
            "--config-file",
            type=Path,
            metavar="FILE",
            default=Path(named) if named else None,
            help=f"the configuration; default: ${session.FILE_VARIABLE}, then "
            f"{session.DEFAULT_FILE} where it exists",
        )
        return parser

    def configure_logging(self) -> None:
        super().configure_logging()
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # cliff would open a shell of its own.
    return App().run(words or ["help"])


if __name__ == "__main__":
    sys.exit(main())
