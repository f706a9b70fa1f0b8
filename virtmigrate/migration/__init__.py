# SPDX-License-Identifier: Apache-2.0
"""Cold migration: plan, copy, verify, hand over; and the way back.

The transfer's record, in the peer's mailbox, is what both hosts agree on. Each
change of it is a compare-and-swap, so exactly one of two that want it wins:

    RESERVED ──source──▶ GIVEN ──peer──▶ TAKEN ──peer──▶ SETTLED ──source──▶ CONFIRMED
        │                  │                                │
        └─────source───────┴──▶ WITHDRAWN                   └──peer──▶ RETURNED

The source may run the instance before it writes GIVEN, and after WITHDRAWN or
RETURNED; the peer from TAKEN on, until RETURNED. So there are never two, and
the record always tells who may.

- ticket.py: the string that the caller carries from host to host
- plan.py: all checks, before anything is touched
- source.py: the host that the instance leaves: copy, hand over, undo, confirm, revert
- target.py: the host that it comes to: take, settle, give back
"""
