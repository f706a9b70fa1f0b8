# SPDX-License-Identifier: Apache-2.0
"""The command's parts that need no host."""

import argparse
import importlib.metadata
import io
import json
import logging
import os
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtmigrate import errors, model
from virtmigrate.cli import display, instance, instances, main, moves, outcome, session
from virtmigrate.conf import GROUP
from virtmigrate.domainxml import Layer, SourceType
from virtmigrate.formats import DiskFormat
from virtmigrate.progress import Progress, Report
from virtmigrate.units import GiB, KiB, MiB

ROOT = Path(__file__).parent.parent.parent
DETAILS = {"instance": "i", "operation": "o", "reason": "r", "peer": "p"}
BACK = {**DETAILS, "state": "running", "host": "alpha", "debts": ""}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def record(owner: str = "virtmigrate") -> model.Instance:
    return model.Instance(
        uuid="u1",
        name="web",
        owner=owner,
        host="alpha",
        state=model.InstanceState.HERE,
        operation="o",
        memory=64 * MiB,
        vcpus=1,
        disks=(),
    )


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.MigrationRefused(**DETAILS), outcome.Outcome.FAILED),
        (errors.MigrationRolledBack(**BACK), outcome.Outcome.FAILED),
        (errors.MigrationUndecided(**DETAILS), outcome.Outcome.UNDECIDED),
        (outcome.NotArrived(**DETAILS), outcome.Outcome.UNDECIDED),
        (errors.Cancelled(), outcome.Outcome.CANCELLED),
        (
            caused(errors.MigrationRolledBack(**BACK), errors.Cancelled()),
            outcome.Outcome.CANCELLED,
        ),
        (
            caused(errors.MigrationRefused(**DETAILS), errors.Cancelled()),
            outcome.Outcome.CANCELLED,
        ),
    ],
    ids=["refused", "back", "undecided", "between", "early", "cancelled", "before"],
)
def test_exit_code(error: Exception, code: outcome.Outcome) -> None:
    assert outcome.of(error) is code
    assert ("cancelled" in outcome.text(error)) == (code == outcome.Outcome.CANCELLED)


def test_exit_codes_are_documented() -> None:
    for each in outcome.Outcome:
        assert f"    {each.value}  " in (outcome.__doc__ or "")
        assert f"{each.value} " in main.DESCRIPTION


# Values on the command line


@pytest.mark.parametrize(
    ("text", "size"),
    [("20G", 20 * GiB), ("512MiB", 512 * MiB), ("4096", 4096), ("1kb", KiB)],
)
def test_size(text: str, size: int) -> None:
    assert moves.size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1.5G", "1X", "1 G"])
def test_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        moves.size(text)


@pytest.mark.parametrize("text", ["1500M", "0"])
def test_not_whole(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole GiB"):
        moves.whole(GiB, "GiB")(text)


def test_chain() -> None:
    assert instance.chain("vda=qcow2:/a/top,raw:/a=b/base") == (
        "vda",
        (
            Layer(SourceType.FILE, "/a/top", DiskFormat.QCOW2),
            Layer(SourceType.FILE, "/a=b/base", DiskFormat.RAW),
        ),
    )
    assert instance.labelled_size("vda[1]=1G") == ("vda[1]", GiB)


@pytest.mark.parametrize(
    "text", ["vda", "=raw:/a", "vda=", "vda=/a", "vda=vmdk:/a", "vda=raw:a"]
)
def test_no_chain(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write "):
        instance.chain(text)


@pytest.mark.parametrize("text", ["vda", "=1G", "vda=big"])
def test_no_labelled_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        instance.labelled_size(text)


# Owners


def test_own_instance_is_ours() -> None:
    instances.demand_ours(record(), "migrate", override=False)


def test_owned_instance_names_the_service_command() -> None:
    with pytest.raises(errors.OwnedElsewhere) as caught:
        instances.demand_ours(record("nova"), "confirm", override=False)
    assert "openstack server resize confirm u1" in str(caught.value)
    with pytest.raises(errors.OwnedElsewhere, match="ganeti's way to migrate"):
        instances.demand_ours(record("ganeti"), "migrate", override=False)


def test_override_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    instances.demand_ours(record("nova"), "migrate", override=True)
    (logged,) = caplog.records
    assert logged.levelname == "WARNING"
    assert "u1 belongs to nova" in logged.getMessage()


# Progress


def test_line() -> None:
    report = Report("copying vda", 64 * MiB, 128 * MiB, 0, 32.0 * MiB)
    assert display.line(report) == (
        "copying vda: 64.0 MiB of 128.0 MiB, 32.0 MiB/s, 2 s left"
    )
    assert display.line(Report("stopping", 0, 0, 0, 0.0)) == "stopping"


def test_plain_lines_are_few() -> None:
    stream = io.StringIO()
    with display.Display(stream) as shown:
        work = Progress(shown.show, interval=0.0)
        for name in ("checking", "copying vda"):
            work.phase(name, 1000)
            for _ in range(1000):
                work.advance(1, sent=1)
    lines = stream.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["checking", "copying vda"]
    assert shown.last.sent == 2000
    assert list(shown.began) == ["checking", "copying vda"]


def test_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with display.Display(stream) as shown:
        work = Progress(shown.show, interval=0.0)
        work.phase("stopping")
        work.phase("copying vda", 4 * MiB)
        work.advance(4 * MiB)
    assert "stopping" in stream.getvalue()
    assert "4.0 MiB of 4.0 MiB" in stream.getvalue()
    assert "iB/s" in stream.getvalue() and "0 s left" in stream.getvalue()


def test_signal_cancels_between_phases() -> None:
    work = display.Work()
    before = signal.getsignal(signal.SIGTERM)
    with display.cancelling(work):
        work.phase("checking")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(errors.Cancelled):
            work.phase("stopping")
    assert signal.getsignal(signal.SIGTERM) is before


def test_bound_work_is_finished() -> None:
    work = display.Work()
    work.bound = True
    work.cancel()
    work.phase("starting there")


# Configuration


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "virtmigrate.conf"
    path.write_text(
        "[virtmigrate]\nstate_path = /state\nowner = nova\nenabled_backends = one\n"
        "peer_uri = qemu+tls://{dest}/system?pkipath=/pki\n[one]\npath = /ours\n"
    )
    return path


def test_peer_is_ours_but_for_what_makes_it_the_peer(file: Path) -> None:
    ours = session.read([file])
    conf = session.peer_conf([file], ours, "beta")
    group = conf[GROUP]
    assert group.uri == "qemu+tls://beta/system?pkipath=/pki"
    assert (group.address, group.state_path) == ("beta", "/state/peers/beta")
    assert (conf.one.path, group.enabled_backends) == ("/ours", ["one"])
    assert ours[GROUP].state_path == "/state"


def test_peer_has_its_own_directories(file: Path) -> None:
    peers = file.parent / "peers"
    peers.mkdir()
    (peers / "beta.conf").write_text(
        "[virtmigrate]\nuri = qemu:///other\n[one]\npath = /theirs\n"
    )
    conf = session.peer_conf([file], session.read([file]), "beta")
    assert conf.one.path == "/theirs"
    assert conf[GROUP].uri.startswith("qemu+tls://beta/")


@pytest.mark.parametrize("dest", ["..", ".", "../x", "a/b", "a?b=c", "a b", ""])
def test_peer_name_is_no_path(file: Path, dest: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        session.peer_conf([file], session.read([file]), dest)


# The application


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Take away the handlers that an application adds."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main.main(words)
    except SystemExit as e:
        code = int(e.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_no_words_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert "instance migrate" in out and "3 undecided" in out


def test_missing_configuration_is_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--config-file", str(tmp_path / "none"), "instance", "list")
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "configuration:" in err and len(err.splitlines()) == 1


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "instance", "migrate")[0] == 2
    assert run(capsys, "nothing", "known")[0] == 2
    words = ("instance", "migrate", "u", "beta", "--root-size", "1500M")
    code, _, err = run(capsys, *words)
    assert code == 2 and "whole GiB" in err


def test_unreachable_libvirt_is_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "conf"
    uri = f"qemu+unix:///system?socket={tmp_path}/none"
    file.write_text(f"[virtmigrate]\nuri = {uri}\nstate_path = {tmp_path}\n")
    words = ("--config-file", str(file), "instance", "list", "-f", "json")
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert "cannot be reached" in err and "Traceback" not in err


def test_environment_names_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(session.FILE_VARIABLE, str(tmp_path / "named"))
    assert str(tmp_path / "named") in run(capsys, "instance", "list")[2]


def test_commands_of_the_project_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][main.NAMESPACE]
    installed = importlib.metadata.entry_points(group=main.NAMESPACE)
    assert json.dumps({e.name: e.value for e in installed}, sort_keys=True) == (
        json.dumps(declared, sort_keys=True)
    )
    for each in installed:
        assert each.load().__doc__
