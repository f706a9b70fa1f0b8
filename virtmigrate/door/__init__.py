# SPDX-License-Identifier: Apache-2.0
"""The door of the image cache: what comes in is looked at once, and made raw.

The one place that inspects bytes, and it only refuses. The look is a process of its own
with limits, which gets an open file and no name. What it lets in may be read by
qemu-img, which is told all formats and names, and opens nothing that a header names.

The rules have a version. A record keeps the one that an image came in by; when the
rules have become stricter, recheck() is an explicit command.
"""

from virtmigrate.door.conversion import convert as convert
from virtmigrate.door.look import inspect as inspect
from virtmigrate.door.look import recheck as recheck
from virtmigrate.door.terms import RULES as RULES
from virtmigrate.door.terms import Found as Found
from virtmigrate.door.terms import Limits as Limits
