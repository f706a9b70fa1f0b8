# SPDX-License-Identifier: Apache-2.0
"""Lets Nova find its driver where it is not in Nova's own site-packages.

In a normal install `nova/virt/virtmigrate` lies beside Nova's other drivers, and this
is not needed. In an editable install, or where virtmigrate is installed elsewhere on
the path, `python -m virtmigrate.nova_plugin.hook` with Nova's Python writes a line
into its site-packages that installs the finder at each start. `--remove` takes it away.
"""

import argparse
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

NAME = "nova.virt.virtmigrate"
_LEAF = Path(__file__).parents[2] / "nova/virt/virtmigrate"
_FILE = "virtmigrate-nova.pth"
_LINE = "import virtmigrate.nova_plugin.hook as hook; hook.install()\n"


class Finder:
    """Finds the leaf beside this package, when nobody else has found it."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return where the leaf is; None for all other modules."""
        if name != NAME:
            return None
        return importlib.util.spec_from_file_location(
            name, _LEAF / "__init__.py", submodule_search_locations=[str(_LEAF)]
        )


def install() -> None:
    """Ask the finder last; nothing happens the second time."""
    if not any(isinstance(each, Finder) for each in sys.meta_path):
        sys.meta_path.append(Finder())


def main(argv: Sequence[str] | None = None) -> int:
    """Write the line, or take it away; say where it is."""
    parser = argparse.ArgumentParser(prog="hook", description=__doc__)
    parser.add_argument("--remove", action="store_true")
    path = Path(sysconfig.get_path("purelib")) / _FILE
    if parser.parse_args(argv).remove:
        path.unlink(missing_ok=True)
        print(f"removed: {path}")
    else:
        path.write_text(_LINE)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
