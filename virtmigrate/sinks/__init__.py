# SPDX-License-Identifier: Apache-2.0
"""Where images go that are made here: a file of this host, an image service.

A sink is told what comes, takes the bytes in order, and proves what it has. Until then
nobody is to use the image; what fails, or is given up, is gone there.
"""

from virtmigrate.sinks.base import CHUNK as CHUNK
from virtmigrate.sinks.base import MANIFEST as MANIFEST
from virtmigrate.sinks.base import Announced as Announced
from virtmigrate.sinks.base import Digest as Digest
from virtmigrate.sinks.base import Piece as Piece
from virtmigrate.sinks.base import Print as Print
from virtmigrate.sinks.base import Service as Service
from virtmigrate.sinks.base import Sink as Sink
from virtmigrate.sinks.base import algorithms as algorithms
from virtmigrate.sinks.base import padded as padded
from virtmigrate.sinks.local import FileSink as FileSink
from virtmigrate.sinks.service import service_sink as service_sink
