"""What the pages show is true: code runs, specs load, commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from builders.__main__ import app
from builders.spec import DeploymentSpec, load_spec
from builders.spec.reading import known_keys
from runtime.server.launch import TritonServer
from runtime.server.supervise import ready_server
from tests import ROOT
from tests.docs.pages import PAGES, Block, anchors, blocks, codes, commands, prose
from tests.gateway.asking import gateway_ports
from tests.generation.setup import write_repository

pytest_plugins = ("tests.generation.fixtures",)

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group has them
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
PYTHON = [block for block in blocks() if block.language == "python"]
CURL = [block for block in blocks() if any(line.startswith("curl ") for line in commands(block))]
YAML = [block for block in blocks() if block.language == "yaml"]
LINES = [(str(block), line) for block in blocks() for line in commands(block) if line.startswith("trireme ")]
LONGEST = 512
_DOORS = {"gateway": "127.0.0.1:8080", "grpc": "127.0.0.1:8081"}  # where the pages have a gateway's two ports
FOLDERS = ("builders/", "cluster/", "docs/", "k8s/", "loadtest/", "measure/", "model_repository/", "runtime/", "tests/")
FILES = ("model.plan", "model.safetensors", "precision.json")  # look like keys of the spec


@pytest.fixture(scope="module")
def generator(decoder_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    settings = {"executor": "openvino", "capacities": (LONGEST,), "max_length": LONGEST, "end_ids": ()}
    root = write_repository(tmp_path_factory.mktemp("repository"), decoder_graph, **settings)
    with ready_server(root) as running:
        yield running


@pytest.fixture(scope="module")
def doors(server: TritonServer) -> Iterator[dict[str, int]]:
    with gateway_ports("minilm", server.ports.http, server.ports.metrics, "--grpc-port", "0") as ports:
        yield ports


def _told(block: Block, request: pytest.FixtureRequest) -> str:
    """The block's text for the server that it wants, at its ports."""
    server: TritonServer = request.getfixturevalue("generator" if block.generator else "server")
    text = block.text.replace("127.0.0.1:8001", server.grpc_address).replace("127.0.0.1:8000", server.http_address)
    for name, address in _DOORS.items():
        if address in text:
            text = text.replace(address, f"127.0.0.1:{request.getfixturevalue('doors')[name]}")
    return text.replace("my-lm", server.settings.ensemble) if block.generator else text


@pytest.mark.triton
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block: Block, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-c", _told(block, request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.triton
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
@pytest.mark.parametrize("block", CURL, ids=str)
def test_curl_gets_an_answer(block: Block, request: pytest.FixtureRequest) -> None:
    command = ["/bin/sh", "-c", _told(block, request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "text_output" in done.stdout if block.generator else "embedding" in done.stdout


@pytest.mark.parametrize("block", YAML, ids=str)
def test_specs_load(block: Block, tmp_path: Path) -> None:
    """A part of a spec is put under a language model, whose slices these parts are of."""
    data = yaml.safe_load(block.text)
    if "model" not in data:
        DeploymentSpec.model_validate({"name": "part", "model": {"source": "a/b", "task": "generation"}, **data})
        return
    (tmp_path / "spec.yaml").write_text(block.text)
    assert load_spec(str(tmp_path / "spec.yaml")).name == data["name"]


@pytest.mark.parametrize(("where", "line"), LINES)
def test_commands_parse(where: str, line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in COMMANDS, f"{where}: no command {name}"
    COMMANDS[name].make_context(name, arguments)


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(Exception, match="--no-such-option"):
        test_commands_parse("here", "trireme build my.yaml --no-such-option")
    with pytest.raises(AssertionError, match="no command bild"):
        test_commands_parse("here", "trireme bild my.yaml")


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_exist(page: str) -> None:
    for words in (code.split() for code in codes(page)):
        if words[0] == "make" and len(words) > 1:
            assert words[1] in TARGETS
        if words[0] == "trireme" and len(words) > 1:
            known = {option for item in COMMANDS[words[1]].params for option in item.opts}
            assert {word for word in words if word.startswith("-")} <= known
    for line in (line for block in blocks() if block.page == page for line in commands(block)):
        if line.startswith("make "):
            assert line.split()[1] in TARGETS


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_running_text_exist(page: str) -> None:
    for code in codes(page):
        if code.startswith(FOLDERS) and not set(code) & set("<*{… "):
            assert (ROOT / code.partition("::")[0]).exists(), code


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_the_spec_in_running_text_exist(page: str) -> None:
    for code in codes(page):
        slice_name, dot, rest = code.partition(".")
        if not dot or slice_name not in DeploymentSpec.model_fields or rest == "py" or code.startswith(FILES):
            continue
        key = re.match(r"\w*", rest)
        assert key is not None
        assert key[0] in known_keys((slice_name,)), code


def test_the_index_names_every_page_and_command() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    named = {words[1] for code in codes("docs/README.md") if (words := code.split())[0] == "trireme" and len(words) > 1}
    assert named == set(COMMANDS)
    assert not [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index
    ]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
