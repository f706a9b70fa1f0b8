# SPDX-License-Identifier: Apache-2.0
"""Our errors as Nova's exceptions, with all that ours say."""

import contextlib
from collections.abc import Callable, Iterator

from nova import exception

from virtmigrate import errors

_AS_BEFORE = (errors.MigrationRefused, errors.MigrationRolledBack)
"""The guest is as it was: Nova may leave the server as it was, too."""


@contextlib.contextmanager
def told(uuid: object = "") -> Iterator[None]:
    """Raise Nova's exception for an error of ours.

    Arguments:
        uuid: of the instance that the work is for.
    """
    try:
        yield
    except errors.Error as e:
        raise translated(e, str(uuid)) from e
    except errors.Cancelled as e:
        raise exception.NovaException(message=f"cancelled: {e}") from e


def translated(error: errors.Error, uuid: str) -> Exception:
    """Return Nova's exception for an error.

    InstanceFaultRollback only where the guest is as it was. What Nova has no word for
    becomes a NovaException: the server's state is ERROR then, and the text says what
    to do.
    """
    if isinstance(error, _AS_BEFORE):
        inner = exception.MigrationError(reason=str(error))
        return _made(exception.InstanceFaultRollback(inner))
    for kind, make in _WORDS:
        if isinstance(error, kind):
            return _made(make(error, uuid))
    return _made(exception.NovaException(message=str(error)))


# Private

_Make = Callable[[errors.Error, str], object]


def _made(found: object) -> Exception:
    assert isinstance(found, Exception)
    return found


def _image(error: errors.Error, uuid: str) -> object:
    image = error.details.get("image", "?")
    return exception.ImageUnacceptable(image_id=image, reason=str(error))


def _input(error: errors.Error, uuid: str) -> object:
    return exception.InvalidInput(reason=str(error))


def _resources(error: errors.Error, uuid: str) -> object:
    return exception.ComputeResourcesUnavailable(reason=str(error))


def _disk(error: errors.Error, uuid: str) -> object:
    return exception.FlavorDiskTooSmall(message=str(error))


_WORDS: tuple[tuple[tuple[type[errors.Error], ...], _Make], ...] = (
    (
        (errors.InstanceNotFound,),
        lambda error, uuid: exception.InstanceNotFound(
            instance_id=error.details.get("instance", uuid)
        ),
    ),
    (
        (errors.InstanceExists,),
        lambda error, uuid: exception.InstanceExists(message=str(error)),
    ),
    (
        (errors.NotEntitled,),
        lambda error, uuid: exception.InstancePowerOnFailure(reason=str(error)),
    ),
    (
        (errors.AgentNotThere,),
        lambda error, uuid: exception.QemuGuestAgentNotEnabled(message=str(error)),
    ),
    (
        (errors.QuiesceFailed,),
        lambda error, uuid: exception.InstanceQuiesceFailed(reason=str(error)),
    ),
    (
        (errors.MigrationError,),
        lambda error, uuid: exception.MigrationError(reason=str(error)),
    ),
    ((errors.NoBackend, errors.NoSpace), _resources),
    ((errors.DiskTooSmall,), _disk),
    ((errors.ImageRefused, errors.ImageNotConverted), _image),
    ((errors.Unsupported,), _input),
    (
        (errors.ConfigurationError,),
        lambda error, uuid: exception.InvalidConfiguration(message=str(error)),
    ),
    (
        (errors.HostError,),
        lambda error, uuid: exception.HypervisorUnavailable(message=str(error)),
    ),
)
"""The first that fits counts."""
