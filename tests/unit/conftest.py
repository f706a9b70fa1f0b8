# SPDX-License-Identifier: Apache-2.0
"""What all unit tests share."""

import hypothesis

# A machine that does other work is slow, and no example is wrong for that.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")
