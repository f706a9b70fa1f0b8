# SPDX-License-Identifier: Apache-2.0
"""Emptying a host: who goes where, how, and what became of them.

values       instances, hosts, ways, plans and reports
packing      who finds room where
ladder       which way is tried next
preflight    what each instance could do, before anything moves
rehearsal    each way tried once, by an instance that is nobody's
execution    the moves; attempt is one instance's turn, lanes whose turn it is, diary
             what was done, so that a killed drain goes on
emptiness    what the host still has in the end
rolling      a round of hosts with one spare
returning    the way back, as a file
mover        what moves an instance: libvirtmover, or a compute service's own; parts
             and link are what the first stands on
"""
