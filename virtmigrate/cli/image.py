# SPDX-License-Identifier: Apache-2.0
"""`image list | show | add | pin | remove | check | prune`."""

import argparse
import datetime
from collections.abc import Callable, Iterable
from typing import Any

from oslo_log import log as logging

from virtmigrate import errors, imagecache, mapping, node, shelf
from virtmigrate.cli import command, display, outcome

LOG = logging.getLogger(__name__)

_KEY = 12
"""Characters of a key that are shown; any unique beginning is understood."""

Row = tuple[Any, ...]


class _Lister(command.Lister):
    """A table of the images of several backends.

    One that does not answer is named, and the command ends with 1.
    """

    def rows(
        self,
        here: node.Node,
        look: Callable[[imagecache.ImageCache], Iterable[Row]],
        backend: str | None = None,
    ) -> list[Row]:
        """Return the rows of all backends that answer, or of one.

        Raises ConfigurationError when there is no backend of this name.
        """
        _demand_backend(here, backend)
        rows = []
        for cache in imagecache.Caches(here).up():
            if backend not in (None, cache.backend):
                continue
            try:
                for row in look(cache):
                    rows.append(row)
            except (errors.StorageError, errors.HostError) as e:
                LOG.error("backend %s is left out: %s", cache.backend, e)
                self.code = outcome.Outcome.FAILED
        return rows


class List(_Lister):
    """Show the images of this host's backends, the least recently used first."""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            rows = self.rows(
                session.look(),
                lambda cache: [_row(cache, each) for each in cache.shelf.all()],
            )
        return _COLUMNS, rows


class Show(command.ShowOne):
    """Show all that is recorded of an image."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        return _with_key(super().get_parser(prog_name))

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            cache, cached = _find(session.look(), parsed_args)
            volume, origin = cached.volume, cached.origin
            return command.columns(
                {
                    "backend": cache.backend,
                    "key": origin.key,
                    "source": origin.source,
                    "name": origin.name,
                    "volume": volume.name,
                    "format at its source": origin.format,
                    "size": volume.size,
                    "minimum disk": origin.min_disk,
                    "checksum": origin.checksum,
                    "digest": volume.digest.root if volume.digest else "",
                    "checked": f"{_time(origin.checked)} by rules {origin.rules}",
                    "used": _time(origin.used),
                    "pinned": origin.pinned,
                    "held by": ", ".join(cached.holders),
                    "references": "\n".join(cached.references),
                }
            )


class Add(command.ShowOne):
    """Fetch an image now, and say what it became."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "source",
            metavar="SOURCE",
            help="a file, an https:// address, or the id of an image of the service",
        )
        parser.add_argument(
            "--disk-format", default="raw", metavar="FORMAT", help="default: raw"
        )
        parser.add_argument(
            "--checksum",
            metavar="ALGORITHM:HEX",
            help="such as sha256:…; demanded for addresses",
        )
        _add_backend(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session, display.working(self.app.stderr) as progress:
            driver = session.here()
            _demand_backend(driver.node, parsed_args.backend)
            source = mapping.named_image(
                session.conf,
                parsed_args.source,
                parsed_args.disk_format,
                parsed_args.checksum,
            )
            name = parsed_args.backend or next(iter(driver.node.backends))
            cache = driver.images.of(driver.node.backend(name))
            image = cache.obtain(source, progress)
            key = image.image.key if image.image else ""
        return command.columns({"backend": name, "key": key, "volume": image.name})


class Pin(command.Plain):
    """Keep an image whatever the limits say."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = _with_key(super().get_parser(prog_name))
        parser.add_argument("--off", action="store_true", help="no more")
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        with self.open() as session:
            cache, cached = _find(session.look(), parsed_args)
            cache.pin(cached, pinned=not parsed_args.off)


class Remove(command.Plain):
    """Drop an idle image now. One that something counts on stays."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        return _with_key(super().get_parser(prog_name))

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        with self.open() as session:
            cache, cached = _find(session.look(), parsed_args)
            cache.remove(cached)


class Check(_Lister):
    """Read images again: is each what its record says, and fit by today's rules?

    Ends with 1 when one is not; nothing is removed.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("image", metavar="KEY", nargs="?", default="")
        _add_backend(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session, display.working(self.app.stderr) as progress:
            here = session.look()

            def look(cache: imagecache.ImageCache) -> Iterable[Row]:
                for cached in cache.shelf.all():
                    if cached.origin.key.startswith(parsed_args.image):
                        said = cache.check(cached, progress) or _GOOD
                        yield (*_row(cache, cached)[:3], said)

            rows = self.rows(here, look, parsed_args.backend)
        if parsed_args.image and not rows:
            raise errors.ImageNotFound(
                host=here.name,
                backend=parsed_args.backend or "any",
                image=parsed_args.image,
            )
        if any(row[-1] != _GOOD for row in rows):
            self.code = outcome.Outcome.FAILED
        return ("backend", "key", "source", "found"), rows


class Prune(_Lister):
    """Drop idle images beyond each backend's limits, and show them."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--dry-run", action="store_true", help="only say which ones"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            dry = parsed_args.dry_run
            rows = self.rows(
                session.look(),
                lambda cache: [_row(cache, each) for each in cache.prune(dry_run=dry)],
            )
        return _COLUMNS, rows


# Private

_GOOD = "good"
_COLUMNS = ("backend", "key", "source", "size", "references", "kept", "used")


def _row(cache: imagecache.ImageCache, cached: shelf.Cached) -> Row:
    origin = cached.origin
    words = (("pinned", origin.pinned), ("held", cached.is_held))
    return (
        cache.backend,
        origin.key[:_KEY],
        origin.source,
        cached.volume.size,
        len(cached.references),
        ", ".join(word for word, is_so in words if is_so),
        _time(origin.used),
    )


def _with_key(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("image", metavar="KEY", help="its key, or the beginning of it")
    _add_backend(parser)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="only in this backend")


def _find(
    here: node.Node, parsed_args: argparse.Namespace
) -> tuple[imagecache.ImageCache, shelf.Cached]:
    _demand_backend(here, parsed_args.backend)
    return imagecache.Caches(here).find(parsed_args.image, parsed_args.backend)


def _demand_backend(here: node.Node, name: str | None) -> None:
    if name is not None and name not in here.backends:
        raise errors.ConfigurationError(
            reason=f"host {here.name} has no backend {name}; it has "
            + ", ".join(here.backends)
        )


def _time(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return at.strftime("%Y-%m-%d %H:%M:%SZ")
