"""The content of the wheel, and that it works without a checkout. .ci/run builds a wheel and names it.

Without a wheel, only the package list of pyproject.toml is compared with the tree.
"""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["registry", "strategies", "evaluators", "compress"]
WHEEL = os.environ.get("PRUNEKIT_WHEEL")
PIPELINE = """
prune: {use: pp, ratio: 0.4}
calibration: {sequences: 4, length: 64}
evaluate:
  - {name: perplexity, window: 64, batch_size: 4, limit: 4}
  - {name: cost, batch_size: 2, length: 32}
"""

STUDY = """
base:
  prune: {use: magnitude}
  evaluate: [{name: zero_shot, limit: 4}, {name: perplexity, window: 64, limit: 4}]
vary: {prune.ratio: [0.2, 0.4]}
"""

SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


NO_WHEEL = "needs a wheel in PRUNEKIT_WHEEL; .ci/run builds one"


def package_of(folder: Path) -> str:
    return ".".join(("prunekit", *folder.relative_to(ROOT).parts))


def files_of_the_package() -> list[Path]:
    """Every file of the four floors, and those of the package itself."""
    below = [path for floor in FLOORS for path in (ROOT / floor).rglob("*")]
    files = [path for path in below if path.is_file() and "__pycache__" not in path.parts]
    return [*ROOT.glob("__*__.py"), *ROOT.glob("py.typed"), *files]


def test_every_package_of_the_tree_is_listed():
    """A folder that pyproject.toml forgets is missing from the wheel, and only there."""
    bundled = ROOT / "compress" / "bundled"
    there = {path.parent for path in files_of_the_package() if path.suffix == ".py"}
    there |= {bundled / "model", bundled / "text"}
    assert sorted(SETUP["packages"]) == sorted(map(package_of, there))


def test_every_data_file_of_the_tree_is_listed():
    for path in files_of_the_package():
        if path.suffix == ".py":
            continue
        listed = [
            pattern
            for folder in path.parents
            if folder.is_relative_to(ROOT)
            for pattern in SETUP["package-data"].get(package_of(folder), ())
            if path in folder.glob(pattern)
        ]
        assert listed, f"{path.relative_to(ROOT)} is missing from package-data in pyproject.toml"


@pytest.fixture(scope="module")
def wheel():
    if not WHEEL:
        pytest.skip(NO_WHEEL)
    with zipfile.ZipFile(WHEEL) as archive:
        yield archive


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A new environment with the wheel in it, and links to everything else that is installed here but prunekit."""
    if not WHEEL:
        pytest.skip(NO_WHEEL)
    folder = tmp_path_factory.mktemp("wheel") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for source in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
        for entry in source.iterdir():
            if not entry.name.startswith(("prunekit", "__editable__", "pip", "__pycache__")):
                (site / entry.name).symlink_to(entry)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    for arguments in (["install", "--quiet", "--no-deps", "--no-index", WHEEL], ["check"]):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


@pytest.fixture
def run(environment, tmp_path):
    """Runs a program of that environment in an empty folder."""

    def command(program: str, *arguments: str) -> str:
        hidden = ("PYTHONPATH", "PRUNEKIT_BLOCK")
        variables = {key: value for key, value in os.environ.items() if key not in hidden} | {"COLUMNS": "200"}
        call = [environment / program, *arguments]
        done = subprocess.run(call, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return command


def test_one_name_at_top_level(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    (info,) = [name for name in top if name.startswith("prunekit-") and name.endswith(".dist-info")]
    assert top == {"prunekit", info}


def test_every_file_of_the_package_is_in_it_and_nothing_else(wheel):
    """No test, no tool and no training script is in it."""
    found = {name for name in wheel.namelist() if name.startswith("prunekit/")}
    assert found == {f"prunekit/{path.relative_to(ROOT)}" for path in files_of_the_package()}
    assert not [name for name in found if {"tests", "tools", "docs"} & set(Path(name).parts)]
    assert not [name for name in found if Path(name).name in ("train.py", "corpus.py", "continuations.py")]


def test_the_bundled_model_and_text_are_in_it(wheel):
    bundled = ROOT / "compress" / "bundled"
    files = [path for folder in ("model", "text") for path in (bundled / folder).iterdir() if path.is_file()]
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {path.name for path in files}
    assert len([path for path in files if path.suffix == ".txt"]) >= 4
    for path in files:
        assert wheel.read(f"prunekit/{path.relative_to(ROOT)}") == path.read_bytes(), path.name


def test_entry_points_and_licences(wheel):
    (points,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    lines = wheel.read(points).decode().splitlines()
    assert "prunekit = prunekit.__main__:main" in lines
    for point in distribution("prunekit").entry_points:
        assert f"{point.name} = {point.value}" in lines
    licences = [name.rsplit("/", 1)[1] for name in wheel.namelist() if ".dist-info/licenses/" in name]
    assert sorted(licences) == ["LICENSE", "LICENSE-PSF.txt"]


def test_the_installed_package_is_the_wheel(run, environment):
    found = run("python", "-c", "import prunekit.registry; print(prunekit.__file__)").strip()
    assert Path(found).is_relative_to(environment.parent)
    assert run("prunekit", "--version") == f"prunekit {distribution('prunekit').version}\n"


def test_it_lists_the_built_ins(run):
    listed = run("prunekit", "list")
    for name in ("pp", "full_batch_probing", "flap", "wanda_sp", "magnitude", "random", "llama", "opt", "perplexity"):
        assert any(line.split()[:1] == [name] for line in listed.splitlines()), name


def test_it_runs_a_pipeline_on_the_bundled_model(run, tmp_path):
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    run("prunekit", "run", "pipeline.yaml", "--out", "results")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert "perplexity" in json.dumps(results)
    assert (tmp_path / "results" / "report.md").is_file() and (tmp_path / "results" / "resolved.yaml").is_file()


def test_what_it_exports_loads_in_plain_transformers(run, tmp_path):
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    options = ("--freeze", "calibration", "--profile", "hf-hetero", "--out", "exported")
    run("prunekit", "export", "pipeline.yaml", *options)
    assert "does not hold" not in run("prunekit", "verify", "exported", "--no-measure")
    program = """
import sys
sys.modules["prunekit"] = None
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)).__name__)
"""
    assert run("python", "-c", program) == "PrunekitLlamaForCausalLM\n"


def test_it_runs_a_study_on_the_bundled_task_and_reports(run, tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    run("prunekit", "ablate", "study.yaml")
    run("prunekit", "report", "results/study.sqlite", "--out", "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "zero-shot" in page and "<style>" in page and "<script>" in page


def test_folders_of_the_user_with_our_names_do_not_get_in_the_way(run, tmp_path):
    for name in FLOORS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('this is not ours')")
    program = "from prunekit.registry import Catalog; c = Catalog.discover(); print(c.problems, *c.names('strategies'))"
    problems, *strategies = run("python", "-c", program).split()
    assert problems == "[]" and {"flap", "magnitude", "pp"} <= set(strategies)
