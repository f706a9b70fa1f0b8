# SPDX-License-Identifier: Apache-2.0
"""The process that looks: the image on stdin, one line of JSON on stdout.

It opens nothing by name, and starts nothing. Arguments: the declared format, and how
many bytes an image may have.
"""

import logging
import os
import sys
from typing import BinaryIO

import msgspec

from virtmigrate.door import rules
from virtmigrate.door.answer import Answer
from virtmigrate.door.terms import Limits, Refusal


def main(declared: str, max_size: str) -> None:
    """Look, and print the answer."""
    # oslo.utils logs what it finds in the image.
    logging.disable()
    limits = Limits(formats=(declared,), max_size=int(max_size))
    with os.fdopen(os.dup(0), "rb") as image:
        sys.stdout.buffer.write(msgspec.json.encode(_look(image, declared, limits)))


def _look(image: BinaryIO, declared: str, limits: Limits) -> Answer:
    try:
        found = rules.examine(image, declared, limits)
    except Refusal as e:
        return Answer(refused=str(e))
    except MemoryError:
        return Answer(refused="reading its header takes more memory than it may")
    except Exception as e:
        return Answer(refused=f"cannot be read as {declared}: {type(e).__name__}: {e}")
    return Answer(format=found.format, virtual_size=found.virtual_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
