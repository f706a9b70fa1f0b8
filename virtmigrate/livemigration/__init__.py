# SPDX-License-Identifier: Apache-2.0
"""Live migration: a running instance goes on at another host.

`moves` is what the driver has; `planning` checks, `departure` is the source's half,
`undoing` its way back, `arrival` the peer's half. `steering` runs libvirt's migration
and watches it, `pace` decides what is done when it stalls. Who may run the instance in
which state: docs/live-migration.md.
"""

from virtmigrate.livemigration.moves import LiveMigrations as LiveMigrations
from virtmigrate.livemigration.terms import Forecast as Forecast
from virtmigrate.livemigration.terms import Options as Options
from virtmigrate.livemigration.terms import Outcome as Outcome
from virtmigrate.livemigration.terms import Status as Status
