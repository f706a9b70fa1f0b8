# SPDX-License-Identifier: Apache-2.0
"""What all unit tests share."""

from collections.abc import Iterator

import hypothesis
import pytest

from virtmigrate import translation

# A machine that does other work is slow, and no example is wrong for that.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _nothing_heard() -> Iterator[None]:
    """Nothing that another test heard from libvirt in this thread."""
    translation.forget()
    yield
