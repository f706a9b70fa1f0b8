# SPDX-License-Identifier: Apache-2.0
"""Emptying a host: who goes where, how, and what became of them.

values      instances, hosts, ways, plans and reports
packing     who finds room where
ladder      which way is tried next
preflight   what each instance could do, before anything moves
execution   the moves, so many at once, with a journal
rolling     a round of hosts with one spare
mover       what moves an instance: libvirt directly, or a compute service
"""
