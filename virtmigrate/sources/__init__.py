# SPDX-License-Identifier: Apache-2.0
"""Where images come from: a file of this host, HTTPS, an image service.

A source says what an image is said to be, and gives its bytes. verified() is how they
are read: what does not have the size and the digest that were promised is refused.
"""

from virtmigrate.sources.base import Checksum as Checksum
from virtmigrate.sources.base import Described as Described
from virtmigrate.sources.base import Received as Received
from virtmigrate.sources.base import Source as Source
from virtmigrate.sources.base import verified as verified
from virtmigrate.sources.download import Terms as Terms
from virtmigrate.sources.limited import Limited as Limited
from virtmigrate.sources.local import LocalFile as LocalFile
from virtmigrate.sources.saved import SavedImage as SavedImage
from virtmigrate.sources.service import service_image as service_image
from virtmigrate.sources.web import WebFile as WebFile
