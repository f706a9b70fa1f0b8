# SPDX-License-Identifier: Apache-2.0
"""The one error of the benchmarks: what was to be measured did not work."""


class BenchmarkError(Exception):
    """A tool failed, or its copy is not the source. The figures are worth nothing."""
