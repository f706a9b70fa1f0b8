# SPDX-License-Identifier: Apache-2.0
"""Options: typed, bounded, and what a peer's name may do to a URI: nothing."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from virtmigrate import conf, errors

ROOT = Path(__file__).parent.parent.parent
GENERATOR = ROOT / "etc/oslo-config-generator.conf"
SAMPLE = ROOT / "etc/virtmigrate.conf.sample"
SECONDS = 60

OPTIONS = [
    *((conf.GROUP, opt) for opt in conf.ALL_HOST_OPTS),
    *(("local", opt) for opt in conf.backend_opts),
]
NUMBERS = [each for each in OPTIONS if isinstance(each[1], cfg.IntOpt | cfg.FloatOpt)]


def names(options: Sequence[tuple[str, cfg.Opt]]) -> list[str]:
    return [opt.name for _, opt in options]


def bounds(opt: cfg.Opt) -> tuple[Any, Any]:
    """Return least and most; None is no bound."""
    return getattr(opt.type, "min", None), getattr(opt.type, "max", None)


def loaded(tmp_path: Path, text: str) -> cfg.ConfigOpts:
    path = tmp_path / "virtmigrate.conf"
    path.write_text(text)
    return conf.load(path)


def option(tmp_path: Path, line: str, group: str = conf.GROUP) -> cfg.ConfigOpts:
    return loaded(tmp_path, f"[{group}]\n{line}\n")


# Reading


def test_defaults_are_whole_and_in_bounds() -> None:
    found = conf.load()
    for group, opt in OPTIONS:
        assert found[group][opt.dest] == opt.default


def test_no_file_reads_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / ".virtmigrate/virtmigrate.conf.d"
    directory.mkdir(parents=True)
    (directory / "mine.conf").write_text("[virtmigrate]\naddress = elsewhere\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert conf.load()[conf.GROUP].address is None


def test_values_are_typed(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        """[virtmigrate]
        connect_timeout = 2.5
        stream_length = 8
        allow_insecure_peers = lab1, lab2
        peer_uris = beta:qemu+tls://b.example/system,gamma:test:///default
        enabled_backends = fast, slow
        [slow]
        path = /srv/slow
        volume_uid = 64055
        volume_mode = 0640
        """.replace("\n        ", "\n"),
    )
    group = found[conf.GROUP]
    assert (group.connect_timeout, group.stream_length) == (2.5, 8)
    assert group.allow_insecure_peers == ["lab1", "lab2"]
    assert group.peer_uris["gamma"] == "test:///default"
    assert (found["slow"].path, found["slow"].volume_uid) == ("/srv/slow", 64055)
    assert found["slow"].volume_mode == "0640"
    assert found["fast"].path == found["fast"]._group._opts["path"]["opt"].default


def test_two_configurations_do_not_touch(tmp_path: Path) -> None:
    one = option(tmp_path, "address = one")
    assert conf.load()[conf.GROUP].address is None
    assert one[conf.GROUP].address == "one"


@pytest.mark.parametrize(("group", "opt"), NUMBERS, ids=names(NUMBERS))
def test_numbers_have_bounds(tmp_path: Path, group: str, opt: cfg.Opt) -> None:
    low, high = bounds(opt)
    assert low is not None
    assert opt.default is None or low <= opt.default <= (high or opt.default)
    for bad in (low - 1, "many", *([high + 1] if high is not None else [])):
        with pytest.raises(errors.ConfigurationError, match=opt.name):
            option(tmp_path, f"{opt.name} = {bad}", group)


@pytest.mark.parametrize(
    ("group", "line"),
    [
        (conf.GROUP, "virt_type = xen"),
        ("local", "volume_mode = 644"),
        ("local", "volume_mode = 06440"),
        ("local", "volume_mode = 0888"),
        (conf.GROUP, "peer_uris = beta"),
    ],
)
def test_unknown_value(tmp_path: Path, group: str, line: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=line.split()[0]):
        option(tmp_path, line, group)


@pytest.mark.parametrize(
    "text", ["[virtmigrate\n", "no group", "[virtmigrate]\nuri\n"], ids=repr
)
def test_file_that_is_no_ini(tmp_path: Path, text: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        loaded(tmp_path, text)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="none"):
        conf.load(tmp_path / "none.conf")


@pytest.mark.parametrize(("group", "opt"), OPTIONS, ids=names(OPTIONS))
def test_help_is_a_sentence(group: str, opt: cfg.Opt) -> None:
    assert opt.help and opt.help.endswith(".")


# Backends


@pytest.mark.parametrize(
    "name",
    [
        "virtmigrate",
        "DEFAULT",
        "default",
        "database",
        "oslo_concurrency",
        "Fast",
        "../etc",
        "1st",
        "a b",
        "x" * 32,
    ],
)
def test_backend_named_like_something_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="backend"):
        option(tmp_path, f"enabled_backends = {name}")


def test_backend_named_like_a_group_of_others() -> None:
    found = cfg.ConfigOpts()
    found.register_opts([cfg.StrOpt("region")], group="glance")
    found(args=[], default_config_files=[], default_config_dirs=[])
    found.register_opts(conf.ALL_HOST_OPTS, group=conf.GROUP)
    found.set_override("enabled_backends", ["glance"], group=conf.GROUP)
    with pytest.raises(errors.ConfigurationError, match="something else"):
        conf.register(found)


@pytest.mark.parametrize("line", ["a,a", "", ","], ids=["twice", "none", "comma"])
def test_backends_once_each(tmp_path: Path, line: str) -> None:
    with pytest.raises(errors.ConfigurationError):
        option(tmp_path, f"enabled_backends = {line}")


def test_registering_twice_is_nothing_new() -> None:
    found = conf.load()
    conf.register(found)
    assert found["local"].kind == "dir"


# Peers


@pytest.mark.parametrize(
    ("dest", "uri"),
    [
        ("beta.example", "qemu+tls://beta.example/system"),
        ("10.0.0.2", "qemu+tls://10.0.0.2/system"),
        ("[fd00::2]", "qemu+tls://[fd00::2]/system"),
        ("beta:16515", "qemu+tls://beta:16515/system"),
    ],
)
def test_peer_uri(dest: str, uri: str) -> None:
    found = conf.load()
    assert conf.peer_uri(found, dest) == uri
    assert conf.transfer_uri(found, dest) == uri


@pytest.mark.parametrize(
    "dest",
    [
        "",
        "beta/system?no_verify=1#",
        "beta?no_verify=1",
        "beta#",
        "user@beta",
        "beta&pkipath=/tmp",
        "be ta",
        "beta\n",
        "beta%2f",
        "{dest}",
        "bèta",
        "b" * 256,
    ],
    ids=repr,
)
def test_dest_adds_nothing_to_the_uri(tmp_path: Path, dest: str) -> None:
    found = option(tmp_path, "transfer_uri = qemu+tls://{dest}:16515/session")
    with pytest.raises(errors.ConfigurationError, match="no host name"):
        conf.peer_uri(found, dest)
    with pytest.raises(errors.ConfigurationError, match="no host name"):
        conf.transfer_uri(found, dest)


def test_peer_with_a_uri_of_its_own(tmp_path: Path) -> None:
    found = option(tmp_path, "peer_uris = beta:qemu+tls://b.example:1/system")
    assert conf.peer_uri(found, "beta") == "qemu+tls://b.example:1/system"
    assert conf.peer_uri(found, "gamma") == "qemu+tls://gamma/system"


def test_transfer_uri_of_its_own(tmp_path: Path) -> None:
    found = option(tmp_path, "transfer_uri = qemu+tls://{dest}:16515/session")
    assert conf.transfer_uri(found, "beta") == "qemu+tls://beta:16515/session"
    assert conf.peer_uri(found, "beta") == "qemu+tls://beta/system"


def test_template_that_is_no_uri(tmp_path: Path) -> None:
    found = option(tmp_path, "peer_uri = {dest}")
    with pytest.raises(errors.ConfigurationError, match="no URI"):
        conf.peer_uri(found, "beta")


# The sample


def test_sample_is_current(tmp_path: Path) -> None:
    made = tmp_path / "made.sample"
    generator = Path(sys.executable).parent / "oslo-config-generator"
    subprocess.run(
        [generator, "--config-file", GENERATOR, "--output-file", made],
        check=True,
        timeout=SECONDS,
        cwd=ROOT,
    )
    is_current = SAMPLE.read_text() == made.read_text()
    command = f"oslo-config-generator --config-file {GENERATOR.relative_to(ROOT)}"
    assert is_current, f"make it anew: {command}"


def test_sample_can_be_read() -> None:
    found = conf.load(SAMPLE)
    assert found[conf.GROUP].uri == "qemu:///system"
