"""What deploy/ holds: options that exist, times that fit together, files that are there. Nothing is built here."""

from __future__ import annotations

import argparse
import configparser
import http.server
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_core.cli.bench_serve import add_bench_serve_arguments
from mm_core.cli.serve import add_serve_arguments
from mm_core.server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
DRAIN_S = ServerConfig().drain_timeout_s  # of the images, which leave it as it is


def serve_arguments(argv: list[str]) -> argparse.Namespace:
    """Of `mm serve`; an option that it has not fails the test."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_serve_arguments(parser)
    found, unknown = parser.parse_known_args(argv)
    assert not unknown, f"mm serve has no {unknown}"
    return found


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def last(name: str, instruction: str) -> str:
    return [rest for kind, rest in instructions(name) if kind == instruction][-1]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles(name: str) -> None:
    stages = [rest for kind, rest in instructions(name) if kind == "FROM"]
    assert len(stages) == 2  # what builds the wheels stays behind
    program, command, *options = json.loads(last(name, "ENTRYPOINT"))
    assert (program, command) == ("mm", "serve")
    given = serve_arguments([*options, "some-model", "--max-model-len", "4096"])  # more is appended by `docker run`
    assert (given.host, given.port, given.model) == ("0.0.0.0", 8000, "some-model")
    assert last(name, "EXPOSE") == "8000"
    user, group = map(int, last(name, "USER").split(":"))
    assert user >= 1000
    assert group >= 1000
    assert last(name, "STOPSIGNAL") == "SIGTERM"
    (patience,) = re.findall(r"docker stop --time (\d+)", (DEPLOY / name).read_text())
    assert float(patience) >= DRAIN_S + 5
    sources = [rest.split()[:-1] for kind, rest in instructions(name) if kind == "COPY" and "--from" not in rest]
    assert sources
    ignored = (DEPLOY / f"{name}.dockerignore").read_text().splitlines()
    for source in itertools.chain.from_iterable(sources):
        assert (ROOT / source).is_dir()
        assert f"!{source}" in ignored  # else the context has it not
    for kind, rest in instructions(name):
        if kind == "RUN" and "pip install" in rest and "[serve" in rest:
            break
    else:
        pytest.fail("the server's extra is not installed")


@pytest.mark.parametrize("name", DOCKERFILES)
@pytest.mark.parametrize("status", [200, 503])
def test_health_checks_of_images(name: str, status: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    _, python, flag, code = re.fullmatch(r'.*CMD (\[)"(\w+)", "(-c)", "(.*)"\]', last(name, "HEALTHCHECK")).groups()  # type: ignore[union-attr]
    assert (python, flag) == ("python3", "-c")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = code.replace(":8000", f":{server.server_port}")
        done = subprocess.run([sys.executable, "-c", here], capture_output=True, timeout=60, env={}, check=False)
        server.shutdown()
    assert (done.returncode == 0) == (status == 200), done.stderr


class Unit(configparser.RawConfigParser):
    """A unit file; of settings that occur again, all values."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",), inline_comment_prefixes=None)
        self.optionxform = str  # type: ignore[assignment, method-assign]
        self.read_string(path.read_text())


def test_unit(tmp_path: Path) -> None:
    unit = Unit(DEPLOY / "mm-serve.service")
    service = dict(unit["Service"])
    _, command, *options = shlex.split(service["ExecStart"])
    assert command == "serve"
    assert options[-2:] == ["$ARGUMENTS", "$MODEL"]
    given = serve_arguments(options[:-2])
    assert float(service["TimeoutStopSec"]) >= given.drain_timeout_s + 5
    assert service["KillMode"] == "mixed"  # the engine's process must not get the SIGTERM
    assert service["Restart"] == "on-failure"
    assert service["OOMPolicy"] == "continue"
    assert "EnvironmentFile" in service
    for name, value in (
        ("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("ProtectHome", "yes"), ("PrivateTmp", "yes"),
        ("CapabilityBoundingSet", ""), ("DynamicUser", "yes"), ("DevicePolicy", "closed"),
        ("MemoryDenyWriteExecute", "no"),
    ):  # fmt: skip
        assert service[name] == value, name
    examples = re.findall(r"^# +ARGUMENTS=(--.*)$", (DEPLOY / "mm-serve.service").read_text(), re.MULTILINE)
    assert examples
    for example in examples:
        serve_arguments(shlex.split(example))
    if shutil.which("systemd-analyze"):
        file = tmp_path / "mm-serve.service"
        file.write_text((DEPLOY / "mm-serve.service").read_text().replace("/opt/mm/bin/mm", shutil.which("true") or ""))
        done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


class Loader(yaml.SafeLoader):
    """With Compose's own tag."""


Loader.add_constructor("!reset", lambda loader, node: None)


def load_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader)


def test_compose() -> None:
    found = load_yaml(DEPLOY / "compose.yml")
    mm = found["services"]["mm"]
    given = serve_arguments([re.sub(r"\$\{\w+:-(.*)\}", r"\1", text) for text in mm["command"]])
    assert float(mm["stop_grace_period"].removesuffix("s")) >= given.drain_timeout_s + 5
    assert given.model == "/opt/zoo/qwen2vl-nano"
    assert f"COPY zoo/qwen2vl-nano {given.model}" in (DEPLOY / "Dockerfile").read_text()
    assert str(given.api_key_file).startswith("/run/secrets/")
    assert mm["read_only"] is True
    for service in found["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert set(service["secrets"]) <= set(found["secrets"])
        assert set(service["networks"]) <= set(found["networks"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith("./") else source in found["volumes"]
    for secret in found["secrets"].values():
        assert secret["file"].startswith("./secrets/")  # which git does not keep
    assert "/secrets/" in (DEPLOY / ".gitignore").read_text().splitlines()
    for name in ("compose.yml", "compose.cpu.yml"):
        build = load_yaml(DEPLOY / name)["services"]["mm"]["build"]
        assert (ROOT / build["dockerfile"]).is_file()


def test_prometheus_and_grafana_find_what_they_show() -> None:
    compose = load_yaml(DEPLOY / "compose.yml")
    (job,) = load_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["mm:8000"]}]
    assert "mm" in compose["services"]
    secret = Path(job["authorization"]["credentials_file"])
    assert secret.name in compose["services"]["prometheus"]["secrets"]
    (source,) = load_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"].split("//")[1].split(":")[0] in compose["services"]
    (provider,) = load_yaml(DEPLOY / "grafana/provisioning/dashboards/mm-core.yml")["providers"]
    mounted = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/mm-core.json" in mounted
    assert json.loads((DEPLOY / "grafana/mm-core.json").read_text())["panels"]


COMMANDS = {"mm serve": add_serve_arguments, "mm bench serve": add_bench_serve_arguments}


@pytest.mark.parametrize("page", ["deployment.md", "bench-serve.md"])
def test_options_in_the_documentation_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    seen = 0
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command, declare in COMMANDS.items():
                if not (found := re.search(rf"(?:^|[\s/]){command}((?: .*)?)$", line)):
                    continue
                parser = argparse.ArgumentParser(allow_abbrev=False)
                declare(parser)
                used = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", found[1]))
                known = {option for action in parser._actions for option in action.option_strings}
                assert used <= known, line
                seen += len(used)
    assert seen > 3
