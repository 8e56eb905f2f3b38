"""What the image's files say of each other and of the code: versions, paths and periods that must fit."""

from __future__ import annotations

import re
from configparser import RawConfigParser

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from daemon.service import LAST_CALLBACKS_SECONDS, SUPERVISOR_START_SECONDS
from daemon.settings import Settings
from tests.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_every_version_in_the_image_stands_in_the_constraints_and_nowhere_else() -> None:
    pinned = {canonicalize_name(line.partition("==")[0]) for line in _constraints()}
    (packages,) = re.findall(r'^ARG IMAGE_PACKAGES="(.*)"$', DOCKERFILE, re.MULTILINE)
    assert [name for name in packages.split() if canonicalize_name(name) not in pinned] == []
    # Torch's alone is the base image's, or the build's argument.
    assert set(re.findall(r"([\w-]+)==", DOCKERFILE)) == {"torch"}


def test_every_library_that_the_project_asks_for_is_pinned_within_its_range() -> None:
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in _constraints()}
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, asked):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_what_the_image_copies_is_what_the_build_is_given() -> None:
    copied = {path for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in lines if line.startswith("!")}
    check = (ROOT / ".ci" / "image-check").read_text()
    (given,) = re.findall(r"cp -r Dockerfile \.dockerignore (.*) \"\$work/context\"", check)
    assert copied == set(given.split())


def test_the_periods_of_supervisord_and_of_the_daemon_fit() -> None:
    supervisord = RawConfigParser(inline_comment_prefixes=(";",))
    supervisord.read(ROOT / "supervisord.conf")
    trainer = supervisord["program:trainer"]
    assert trainer.getfloat("startsecs") == SUPERVISOR_START_SECONDS
    drain_seconds = Settings.model_fields["drain_seconds"].default
    kill_seconds = Settings.model_fields["kill_seconds"].default
    assert trainer.getfloat("stopwaitsecs") > drain_seconds + kill_seconds + LAST_CALLBACKS_SECONDS


def test_what_supervisord_takes_from_the_environment_has_a_default_in_the_image() -> None:
    needed = set(re.findall(r"%\(ENV_(\w+)\)s", (ROOT / "supervisord.conf").read_text()))
    (given,) = re.findall(r"^ENV ((?:.*\\\n)*.*)", DOCKERFILE, re.MULTILINE)
    assert needed and needed <= set(re.findall(r"(\w+)=", given))


def test_the_base_image_is_named_once_and_repeated_faithfully() -> None:
    (base,) = re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.MULTILINE)
    (default,) = re.findall(r"^BASE\s+\?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert base == default


def _constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_one_torch_is_promised_pinned_and_in_the_image() -> None:
    """The floor is the pinned version, which all tests run with: CI needs no second one. It brings Triton 3.7.1."""
    import tomllib

    (pinned,) = [line.partition("==")[2] for line in _constraints() if line.startswith("torch==")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = [one for one in project["dependencies"] if Requirement(one).name == "torch"]
    assert asked == f"torch>={pinned.removesuffix('.0')}"
    (base,) = re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.MULTILINE)
    (other,) = re.findall(r'^ARG TORCH="(.*)"$', DOCKERFILE, re.MULTILINE)
    assert f"-torch{pinned.replace('.', '')}-" in base and other == ""
    # PyTorch publishes 2.12 and newer for CUDA 12.6 and 13, and none for 12.8.
    assert re.findall(r"-cu(\d+)-", base) == ["1300"]
