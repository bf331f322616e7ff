"""The example plugin, in a folder of its own and installed by pip, is found by the command and runs from YAML."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "plugin"
PIPELINE = """
prune: {use: max_weight_pp, ratio: 0.4}
calibration: {sequences: 4, length: 64}
evaluate:
  - {name: perplexity, window: 64, batch_size: 4, limit: 4}
output: {trace: true}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the example, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    return install(folder / "source", folder / "site")


def install(source: Path, site: Path) -> Path:
    """Have pip install a package into a folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", site, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture
def prunekit(installed, tmp_path):
    """Runs the command in an empty folder, with the plugin installed by default."""

    def command(*arguments: str, plugin: bool = True, **variables: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if key != "PRUNEKIT_BLOCK"}
        path = [str(installed)] * plugin + environment.get("PYTHONPATH", "").split(os.pathsep)
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "COLUMNS": "200", **variables}
        program = [sys.executable, "-c", "from prunekit.compress.cli.main import main; main()", *arguments]
        return subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return command


def test_pip_installs_the_module_and_its_entry_point(installed):
    assert (installed / "prunekit_max_weight.py").is_file()
    (info,) = installed.glob("prunekit_max_weight-*.dist-info")
    assert (info / "entry_points.txt").read_text().split() == ["[prunekit]", "max_weight", "=", "prunekit_max_weight"]


def test_it_is_listed_with_its_distribution(prunekit):
    done = prunekit("list")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert "prunekit-max-weight 0.1.0" in lines["max_weight"] and "Largest weight times" in lines["max_weight"]
    assert "prunekit-max-weight 0.1.0" in lines["max_weight_pp"]
    assert "prunekit 0" in lines["wanda_sp"]
    assert "max_weight" not in prunekit("list", plugin=False).stdout


def test_it_can_be_switched_off(prunekit):
    done = prunekit("list", "scorers", PRUNEKIT_BLOCK="prunekit-max-weight")
    assert done.returncode == 0, done.stderr
    assert "max_weight" not in done.stdout and "ppsp" in done.stdout


def test_it_runs_from_yaml(prunekit, tmp_path):
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    done = prunekit("run", "pipeline.yaml", "--out", "results")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert "max_weight_pp" in json.dumps(results)
    decisions = [json.loads(line) for line in (tmp_path / "results" / "decisions.jsonl").read_text().splitlines()]
    assert decisions and {record["kind"] for record in decisions} == {"attention", "mlp"}
    without = prunekit("run", "pipeline.yaml", "--out", "again", plugin=False)
    assert without.returncode == 2 and "no Strategy is called 'max_weight_pp'" in without.stderr
    assert not (tmp_path / "again").exists()


def test_the_example_distribution_passes_its_own_tests(tmp_path):
    """LLM-Pruner's importance, written with public names, installed by pip."""
    taylor = EXAMPLE.parent / "prunekit-taylor"
    copy, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(taylor, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    install(copy, site)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    environment = {key: value for key, value in os.environ.items() if key != "PRUNEKIT_BLOCK"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


def test_the_example_distribution_uses_public_names_alone():
    source = (EXAMPLE.parent / "prunekit-taylor" / "prunekit_taylor.py").read_text()
    homes = set(re.findall(r"^from (prunekit\S*) import", source, re.MULTILINE))
    assert homes == {"prunekit.registry", "prunekit.strategies"}
