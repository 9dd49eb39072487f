"""What cannot be run here (containers, systemd) is held against the code: names of settings, modules, files, roles."""

import configparser
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import settings_table
from deploy.postgres import APP, DATABASE, OWNER
from dicom_gateway.settings import GatewaySettings
from storage.settings import Settings

_ROOT = Path(__file__).resolve().parent.parent
_COMPOSE = _ROOT / "deploy" / "compose"
_UNIT = _ROOT / "deploy" / "systemd" / "yuanzhen-gateway.service"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((_COMPOSE / "compose.yaml").read_text())
    return loaded


def test_every_setting_in_the_compose_file_exists_and_none_that_is_required_is_missing(compose: dict[str, Any]) -> None:
    used = {
        name
        for service in compose["services"].values()
        for name in service.get("environment", {})
        if name.startswith("YUANZHEN_")
    }
    assert used <= settings_table.names()
    required = {f"YUANZHEN_{name}".upper() for name, field in Settings.model_fields.items() if field.is_required()}
    assert required <= set(compose["x-centre"]["environment"])


def test_every_command_in_the_compose_file_is_a_module_that_exists(compose: dict[str, Any]) -> None:
    modules = []
    for service in compose["services"].values():
        command = service.get("command", [])
        if command[:2] == ["python", "-m"]:
            modules.append(command[2])
            modules += [argument for argument in command[3:4] if argument.startswith("deploy.")]
    assert {"reading_queue.server", "routing.server", "routing.clock", "dramatiq", "deploy.worker"} == set(modules)
    assert [module for module in modules if find_spec(module) is None] == []


def test_every_variable_of_the_compose_file_is_in_the_example_and_the_other_way_round() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (_COMPOSE / "compose.yaml").read_text()))
    offered = set(re.findall(r"^(\w+)=", (_COMPOSE / "example.env").read_text(), re.MULTILINE))
    assert asked == offered


def test_every_file_and_volume_that_the_compose_file_names_is_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.rsplit(":/", 1)[0]
            if source.startswith("./"):
                assert (_COMPOSE / source).exists(), source
            elif not source.startswith("$"):
                assert source in compose["volumes"], source
        assert set(service.get("depends_on", ())) <= set(compose["services"])
    build = compose["x-centre"]["build"]
    assert (_COMPOSE / build["context"] / build["dockerfile"]).exists()


def test_the_workers_take_every_queue(compose: dict[str, Any]) -> None:
    queues = set()
    for name in ("worker", "triage"):
        command = compose["services"][name]["command"]
        queues |= set(command[command.index("--queues") + 1 :])
    assert queues == {"route", "return", "maintenance", "triage-urgent", "triage"}


def test_the_containers_make_the_same_roles_as_the_one_machine_stack() -> None:
    script = (_COMPOSE / "roles.sh").read_text()
    assert set(re.findall(r"CREATE ROLE (\w+)", script)) == {OWNER, APP}
    assert f"-d {DATABASE}" in script


def test_the_gateways_unit_names_settings_and_a_module_that_exist() -> None:
    unit = _UNIT.read_text()
    named = set(re.findall(r"YUANZHEN_GATEWAY_(\w+)", unit))
    assert {name.lower() for name in named} <= set(GatewaySettings.model_fields)
    module = re.search(r"ExecStart=\S+ -m (\S+)", unit)
    assert module is not None
    assert find_spec(module[1]) is not None
    # Without sd_notify in the gateway a watchdog would kill a healthy one.
    assert "WatchdogSec" not in unit
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.read_string(unit)
    assert set(parser.sections()) == {"Unit", "Service", "Install"}


def test_systemd_accepts_the_gateways_unit(tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is missing")
    unit = tmp_path / _UNIT.name
    unit.write_text(_UNIT.read_text().replace("/opt/yuanzhen/bin/python", "/bin/true"))
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert _UNIT.name not in done.stderr, done.stderr


def test_the_document_of_settings_is_what_the_code_says() -> None:
    document = _ROOT / "docs" / "settings.md"
    assert document.read_text() == settings_table.render(), "make docs"


def test_the_lock_names_one_exact_version_for_everything_the_project_asks_for() -> None:
    import tomllib

    lines = [line for line in (_ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][^+@/]*", line) for line in lines), "an address or a local version"
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [one for group in project["optional-dependencies"].values() for one in group]
    wanted = {re.match(r"[A-Za-z0-9._-]+", one)[0] for one in asked}  # type: ignore[index]
    assert {re.sub(r"[._]", "-", name).lower() for name in wanted} - {"yuanzhen"} <= set(names), "make lock"
