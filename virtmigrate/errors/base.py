# SPDX-License-Identifier: Apache-2.0
"""What all errors of ours have in common, and those of no kind of work."""


class Error(Exception):
    """Base of everything that virtmigrate raises on purpose.

    A subclass gives `msg`, a template; keyword arguments fill it and stay
    readable as attributes.
    """

    msg = "{reason}"

    def __init__(self, **details: object) -> None:
        self.details = details
        super().__init__(self.msg.format(**details))

    def __getattr__(self, name: str) -> object:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        raise AttributeError(name)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.details)


def _rebuild(cls: type[Error], details: dict[str, object]) -> Error:
    return cls(**details)


class Cancelled(Exception):
    """Whoever asked for the work asked for it to stop."""


class ConfigurationError(Error):
    msg = "configuration: {reason}"


class Unsupported(Error):
    msg = "backend {backend} cannot {operation}: {reason}"


class XmlRefused(Error):
    msg = "XML is refused: {reason}"


class DomainNotUnderstood(Error):
    msg = "domain {domain}: {reason}"
