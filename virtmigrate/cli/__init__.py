# SPDX-License-Identifier: Apache-2.0
"""The command `virtmigrate`, over the same driver that a compute service uses.

- main.py: the application: options, logging, completion
- outcome.py: exit codes, and what each error means to a script
- session.py: the drivers of one command, this host's and a peer's
- halves.py: the peer's half of a move, by its own driver or by one in this process
- instances.py: finding an instance, and whom it belongs to
- display.py: progress for people and for logs; cancelling by a signal
- instance.py, moves.py, host.py, receiver.py: the commands
"""
