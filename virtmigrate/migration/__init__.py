# SPDX-License-Identifier: Apache-2.0
"""Cold migration: plan, copy, verify, hand over; and the way back.

The transfer's record, in the peer's mailbox, is what both hosts agree on. Each
change of it is a compare-and-swap, so exactly one of two that want it wins:

    RESERVED ──source──▶ GIVEN ──peer──▶ TAKEN ──peer──▶ SETTLED ──source──▶ CONFIRMED
        │                  │                                │
        └─────source───────┴──▶ WITHDRAWN       RETURNED ◀──peer── RETURNING

The source may run the instance before it writes GIVEN, and after WITHDRAWN or
RETURNED; the peer from TAKEN on, until RETURNING, which it can write from TAKEN
and from SETTLED. So there are never two, and the record always tells who may.

- ticket.py: the string that the caller carries from host to host
- plan.py: all checks, before anything is touched
- source.py: the host that the instance leaves: copy, hand over, undo, confirm, revert
- departure.py, undo.py: one move, there and back; facts.py: what its journal says
- cargo.py: the volumes of a move: room, copies, proof
- target.py: the host that it comes to: take, settle, give back
- arrival.py: one instance that comes; merging.py: the layer that its source needed
"""
