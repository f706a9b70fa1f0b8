# SPDX-License-Identifier: Apache-2.0
"""How fast we are, and how small, beside what anybody would use instead."""
