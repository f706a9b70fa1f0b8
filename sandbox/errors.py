# SPDX-License-Identifier: Apache-2.0
"""Errors of the sandbox."""


class SandboxError(Exception):
    """Something of the sandbox could not be done; the text says what to do."""
