# SPDX-License-Identifier: Apache-2.0
"""How long the tests of each module take, roughly: to divide them evenly.

In seconds, as the summary of a run says, on two cores where both parts run. Nothing
but the division depends on it; a module that is not here counts a second for a test.
"""

SECONDS = {
    "test_tenures.py": 332,
    "test_imagecache.py": 263,
    "test_snapshots.py": 230,
    "test_lvm.py": 210,
    "test_agent.py": 208,
    "test_snapshots_move.py": 190,
    "test_identity.py": 179,
    "test_same_host.py": 151,
    "test_transient.py": 148,
    "test_drain.py": 143,
    "test_cli.py": 138,
    "test_kills.py": 133,
    "test_live_migration.py": 130,
    "test_snapshot_rbd.py": 124,
    "test_contract.py": 117,
    "test_drain_live.py": 116,
    "test_kinds.py": 115,
    "test_conversion.py": 100,
    "test_weather.py": 94,
    "test_neighbours.py": 89,
    "test_snapshot_kinds.py": 89,
    "test_consistency.py": 85,
    "test_migration.py": 85,
    "test_live_migration_faults.py": 82,
    "test_locks.py": 81,
    "test_sandbox_ceph.py": 81,
    "test_transient_kinds.py": 79,
    "test_snapshot_failures.py": 74,
    "test_live_migration_switch.py": 73,
    "test_snapshot_quiesce.py": 70,
    "test_receiver.py": 68,
    "test_resume.py": 68,
    "test_failures.py": 64,
    "test_live_snapshot.py": 60,
    "test_snapshot_inside.py": 58,
    "test_snapshot_limits.py": 55,
    "test_clone_disks.py": 54,
    "test_never_two.py": 52,
    "test_snapshot_model.py": 48,
    "test_snapshot_kills.py": 41,
}
