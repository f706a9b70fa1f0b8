# SPDX-License-Identifier: Apache-2.0
"""What is made of the benchmarks' figures, and the disks that they are taken on."""

import json
from pathlib import Path

import pytest

from benchmarks import cases, disks, errors, snapshot, table, ticker
from benchmarks.measure import Figures
from virtmigrate.units import GiB, KiB, MiB


def figures(
    seconds: float = 1.0, *, wire: int = 0, client: int = 0, peer: int = 0
) -> Figures:
    return Figures(seconds, wire, client, peer)


def judged(results: table.Results, **amounts: int) -> dict[str, table.Verdict]:
    """Return the verdicts of which something was measured, by their first words."""
    found = table.verdicts(results, amounts, streams=2)
    return {each.what: each for each in found if each.reached is not None}


# The table


def test_medians_of_time_and_bytes_but_the_largest_memory() -> None:
    rounds = [
        figures(3.0, wire=30, client=1, peer=9),
        figures(1.0, wire=10, client=7, peer=2),
        figures(2.0, wire=20, client=3, peer=3),
    ]
    assert table.middle(rounds) == figures(2.0, wire=20, client=7, peer=9)


def test_ratio_is_ours_by_theirs() -> None:
    tools = {"virtmigrate": figures(3.0), "scp": figures(4.0)}
    assert table.ratio(tools, "scp") == 0.75
    assert table.ratio(tools, "rsync") is None
    assert table.ratio({"scp": figures()}, "scp") is None


@pytest.mark.parametrize(("seconds", "reached"), [(2.4, True), (2.5, False)])
def test_time_against_another_tool(seconds: float, reached: bool) -> None:
    tools = {"virtmigrate": figures(seconds), "scp": figures(4.0)}
    verdict = judged({"dense": tools})["dense: at most 0.6 x scp"]
    assert verdict.reached is reached
    assert str(verdict).lstrip().startswith("reached" if reached else "NOT REACHED")


@pytest.mark.parametrize(("wire", "reached"), [(102, True), (103, False)])
def test_bytes_against_what_is_needed(wire: int, reached: bool) -> None:
    results = {"sparse": {"virtmigrate": figures(wire=wire)}}
    verdict = judged(results, sparse=100)["sparse: at most 1.02 x the bytes needed"]
    assert verdict.reached is reached


def test_the_largest_growth_counts() -> None:
    results = {
        "dense": {"virtmigrate": figures(client=64 * MiB, peer=257 * MiB)},
        "many": {"virtmigrate": figures(client=1, peer=1)},
    }
    found = list(judged(results).values())
    assert [each.reached for each in found] == [True, False]
    assert found[1].seen == "257.0 MiB in dense"


def test_what_was_not_measured_is_not_reached() -> None:
    found = list(table.verdicts({}, {}, streams=1))
    assert {each.reached for each in found} == {None}
    assert len(found) == len(table.GOALS) + 2


def test_every_goal_is_of_a_case() -> None:
    assert {goal.case for goal in table.GOALS} <= set(cases.CASES)


def test_table_names_all_tools() -> None:
    tools = {"virtmigrate": figures(1.0), "nbdcopy": figures(2.0, wire=GiB)}
    text = "\n".join(table.table({"dense": tools}))
    for word in ("dense", "virtmigrate", "nbdcopy", "0.50x", "1.0 GiB"):
        assert word in text


def test_file_is_case_tool_figures(tmp_path: Path) -> None:
    path = tmp_path / "transfer.json"
    table.save({"dense": {"scp": Figures(1.5, 2, 3, 4)}}, path)
    assert json.loads(path.read_text()) == {
        "dense": {
            "scp": {
                "seconds": 1.5,
                "wire_bytes": 2,
                "client_peak_bytes": 3,
                "peer_growth_bytes": 4,
            }
        }
    }


# The disks


def test_places_are_aligned_and_apart() -> None:
    for runs in (
        disks.places(GiB, 41, MiB, "a"),
        disks.places(GiB, 5000, 4 * KiB, "a"),
        disks.spread(8 * GiB, 64, 8 * MiB, "a"),
    ):
        length = runs[0][1]
        assert all(offset % min(length, MiB) == 0 for offset, _ in runs)
        ends = [offset + length for offset, _ in runs]
        assert all(
            end <= begin for end, (begin, _) in zip(ends, runs[1:], strict=False)
        )


def test_change_and_put_back(tmp_path: Path) -> None:
    disk = disks.dense(tmp_path / "disk", 3 * MiB + 5)
    first = disk.path.read_bytes()
    before = disks.change(disk.path, [(MiB, 4 * KiB), (2 * MiB, 10)], "changed")
    second = disk.path.read_bytes()
    assert first[:MiB] == second[:MiB] and len(first) == len(second)
    assert first[MiB : MiB + 4 * KiB] != second[MiB : MiB + 4 * KiB]
    assert first[2 * MiB + 10 :] == second[2 * MiB + 10 :]
    disks.put_back(disk.path, before)
    assert disk.path.read_bytes() == first


def test_holes_stay_holes(tmp_path: Path) -> None:
    disk = disks.write(tmp_path / "disk", 64 * MiB, [(8 * MiB, MiB)], "seed")
    assert disk.path.stat().st_size == 64 * MiB
    assert disk.path.stat().st_blocks * 512 <= 2 * MiB
    assert disk.is_sparse
    assert not disks.dense(tmp_path / "dense", 2 * MiB).is_sparse


@pytest.mark.parametrize("content", [b"abc", b"ab", b""])
def test_a_copy_that_differs(tmp_path: Path, content: bytes) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"abd")
    copy.write_bytes(content)
    with pytest.raises(errors.BenchmarkError):
        disks.compare(source, copy)
    disks.compare(source, source)


def test_empty_disks_of_any_size_are_compared_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, size in zip(paths, (GiB, GiB, 2 * GiB), strict=True):
        with path.open("wb") as file:
            file.truncate(size * KiB)
    disks.compare(paths[0], paths[1])
    with pytest.raises(errors.BenchmarkError):
        disks.compare(paths[0], paths[2])


# Snapshots


@pytest.mark.parametrize(
    ("what", "limit"),
    [("delete", 1.2), ("disk snapshot: gap", 1.13), ("checkpoint: stopped", 1.13)],
)
def test_snapshot_against_virsh(what: str, limit: float) -> None:
    assert snapshot.limit_of(what, 1.0) == pytest.approx(limit)
    for ours, said in ((limit - 0.001, " reached"), (limit + 0.001, "NOT reached")):
        lines = list(snapshot.table({what: {"ours": ours, "virsh": 1.0}}))
        assert said in lines[1] and "virsh 1000 ms" in lines[0]


def test_a_figure_without_a_rival_is_only_shown() -> None:
    assert len(list(snapshot.table({"no snapshot: gap": {"guest": 0.1}}))) == 1


def test_ticker_is_a_boot_sector(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    ticker.image(disk, 4 * MiB)
    assert disk.stat().st_size == 4 * MiB
    sector = disk.read_bytes()[: ticker.SECTOR]
    assert sector[-2:] == b"\x55\xaa" and sector.startswith(ticker.PROGRAM)
