"""`prunekit new`: every package that it writes is found, passes the checks and its own tests, and runs as it is."""

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from prunekit.compress import check_architecture
from prunekit.compress.cli.scaffold import KINDS, family_of, write_package
from prunekit.compress.models.small import small_model
from prunekit.registry import ROLES, Catalog, SpecError
from prunekit.registry.catalog import singular

from tests.test_public_names import private_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [(kind, f"own_{kind}", None) for kind in KINDS if kind != "architecture"]
PACKAGES += [("architecture", "own_biogpt", "biogpt"), ("architecture", "own_type", "no_known_type")]
NAMES = [name for _, name, _ in PACKAGES]
REFUSED = runpy.run_path(str(ROOT / "tests" / "test_language.py"))["refused"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a package of every kind."""
    folder = tmp_path_factory.mktemp("made")
    for kind, name, model_type in PACKAGES:
        write_package(kind, name, folder / name, model_type)
    return folder


@pytest.fixture
def installed(made, tmp_path, monkeypatch):
    """The packages are on sys.path with their entry points, as if pip had installed them."""
    for name in NAMES:
        project = tomllib.loads((made / name / "pyproject.toml").read_text())["project"]
        info = tmp_path / f"prunekit_{name}-0.1.0.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(about)
        points = (f"{point} = {module}\n" for point, module in project["entry-points"]["prunekit"].items())
        (info / "entry_points.txt").write_text("[prunekit]\n" + "".join(points))
        monkeypatch.syspath_prepend(made / name)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield made
    for module in [module for module in sys.modules if module.startswith("prunekit_own_")]:
        del sys.modules[module]


def test_the_command_says_what_to_run_next(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = command("new", "scorer", "some-scorer")
    assert code == 0
    files = "README.md, pipeline.yaml, prunekit_some_scorer.py, pyproject.toml, test_prunekit_some_scorer.py"
    assert output == (
        f"prunekit-some-scorer has {files} Next: pip install -e ./prunekit-some-scorer prunekit check some_scorer "
        "prunekit run prunekit-some-scorer/pipeline.yaml"
    )
    assert sorted(os.listdir("prunekit-some-scorer")) == files.split(", ")
    code, output = command("new", "scorer", "some_scorer")
    assert code == 2 and "prunekit-some-scorer exists; choose another folder with --out" in output
    code, output = command("new", "scorer", "some_scorer", "--out", "a/b")
    assert code == 0 and "prunekit run a/b/pipeline.yaml" in output
    code, output = command("new", "export_format", "some_format", "--out", "d")
    assert code == 0 and output.endswith("prunekit export d/pipeline.yaml --profile some_format --out exported")
    readme = (tmp_path / "d" / "README.md").read_text()
    assert "prunekit export pipeline.yaml --profile some_format --out exported\n" in readme
    code, output = command("new", "architecture", "some_family", "--model-type", "xglm", "--out", "c")
    assert code == 0 and "The names in the layers of xglm are guessed; prunekit check says if they are right." in output
    source = (tmp_path / "c" / "prunekit_some_family.py").read_text()
    assert 'sizes: SizeFields | None = SizeFields(width="ffn_dim")' in source and 'consumer="fc2"' in source
    assert 'width="embed_dim",\n    )' in source  # what the attention's forward reshapes to


def test_a_width_is_a_field_that_another_small_model_follows():
    """4,096 channels, as many as the small models have tokens: ffn_dim of XGLM, and no field of GPTBigCode."""
    catalog = Catalog.discover(block="")
    assert family_of(catalog, "xglm")[0]["sizes"] == 'SizeFields(width="ffn_dim")'
    assert family_of(catalog, "gpt_bigcode")[0]["sizes"] == "None"


def test_a_guessed_package_of_another_width_passes_its_check(tmp_path):
    write_package("architecture", "own_xglm", tmp_path / "own_xglm", "xglm")
    made = runpy.run_path(str(tmp_path / "own_xglm" / "prunekit_own_xglm.py"))
    check_architecture(made["OwnXglm"](), small_model("xglm"))


def test_there_is_a_template_for_every_role():
    assert sorted(map(singular, ROLES)) == KINDS
    page = (ROOT / "docs" / "pipeline-files.md").read_text()
    (section,) = re.findall(r"^## `prunekit new`\n(.*?)^## ", page, flags=re.MULTILINE | re.DOTALL)
    assert set(KINDS) <= set(re.findall(r"`(\w+)`", section))


def test_every_package_is_listed(installed, command):
    found = {entry.name: entry.provider for entry in Catalog.discover().entries}
    assert [found.get(name) for name in NAMES] == [f"prunekit-{name.replace('_', '-')} 0.1.0" for name in NAMES]
    code, output = command("list")
    assert code == 0 and set(NAMES) <= set(output.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_package_passes_the_checks(installed, command, name):
    code, output = command("check", name, "--json")
    found = json.loads(output)
    assert code == 0 and {each["component"] for each in found} == {name}
    left_out = [each["message"] for each in found if each["result"] == "left out"]
    assert not left_out or (name == "own_type" and "no small no_known_type can be made" in left_out[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_package_passes_its_own_tests(installed, name):
    tests = runpy.run_path(str(installed / name / f"test_prunekit_{name}.py"))
    ran = [test() for key, test in tests.items() if key.startswith("test_")]
    assert len(ran) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_file_of_a_package_runs(installed, command, tmp_path, name):
    file, out = installed / name / "pipeline.yaml", tmp_path / "results"
    if name == "own_export_format":
        code, output = command("export", file, "--profile", name, "--out", out)
        assert code == 0, output
        assert (out / name / "weights.safetensors").is_file()
        return
    code, output = command("run", file, "--out", out)
    assert code == 0, output
    written = (out / "resolved.yaml").read_text()
    assert name in written or name == "own_biogpt"  # which its model type names
    assert "warning" not in output or name == "own_policy"  # griffin cuts MLPs alone, and says how much that is


@pytest.mark.slow
def test_pip_installs_a_package_and_pytest_runs_its_tests(made, tmp_path):
    name, source = "own_scorer", tmp_path / "source"
    shutil.copytree(made / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--target", tmp_path / "site", source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (info,) = (tmp_path / "site").glob("prunekit_own_scorer-0.1.0.dist-info")
    assert (info / "entry_points.txt").read_text().split() == ["[prunekit]", name, "=", f"prunekit_{name}"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", source], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_mypy_finds_nothing_in_the_code(made, tmp_path):
    """With the options of mypy --strict, from outside; what `make types` has read of prunekit is not read again."""
    pytest.importorskip("mypy")
    if not (ROOT / ".mypy_cache").is_dir() or not (ROOT / "build" / "types" / "prunekit").exists():
        pytest.skip("needs what `make types` leaves")
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (strict,) = [each for each in overrides if each.pop("module") == ["user_script"]]
    options = ", ".join(f"{key}={value}".replace("_", "-") for key, value in strict.items())
    for path in made.glob("*/*.py"):
        (tmp_path / path.name).write_text(f"# mypy: {options}\n{path.read_text()}")
    wrong = tmp_path / "wrong.py"  # the control: these options are in effect
    wrong.write_text(f"# mypy: {options}\ndef f(x): return x\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *sorted(tmp_path.glob("*.py"))], capture_output=True, text=True, cwd=ROOT
    )
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(lines) == 1 and "wrong.py:2: error: Function is missing a type annotation" in lines[0], done.stdout


def test_the_code_is_plain_and_imports_public_names(made):
    for path in made.glob("*/*.*"):
        kind = {".py": "code.py", ".toml": ".toml", ".yaml": ".yaml", ".md": ".md"}[path.suffix]
        assert REFUSED(path.read_text(), kind) == [], path
        assert path.suffix != ".py" or private_imports(path.read_text()) == [], path
    ruff = ["ruff", "check", "--no-cache", "--select", "E,F,I,B,UP,SIM,RUF"]
    done = subprocess.run([sys.executable, "-m", *ruff, *sorted(made.iterdir())], capture_output=True, text=True)
    if "No module named ruff" in done.stderr:
        pytest.skip("needs ruff")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("kind", "name", "model_type", "said"),
    [
        ("scorer", "wanda_sp", None, "has a component or a plugin called 'wanda_sp'; choose another name"),
        ("scorer", "WANDA_SP", None, "has a component or a plugin called 'WANDA_SP'"),
        ("scorer", "families", None, "has a component or a plugin called 'families'"),
        ("scorer", "two words", None, "'two words' is not made of words of letters and digits, such as my_scorer"),
        ("scorer", "../outside", None, "'../outside' is not made of words"),
        ("scorer", "trailing_", None, "'trailing_' is not made of words"),
        ("scorer", "null", None, "YAML reads the name 'null' as None"),
        (
            "scorer",
            "tensor",
            None,
            "would be called Tensor, as another name in its module or its tests; choose another",
        ),
        (
            "scorer",
            "llama_config",
            None,
            "'llama_config' would be called LlamaConfig, as another name in its module or",
        ),
        ("evaluator", "MODEL", None, "would be called MODEL, as another name"),
        ("scorer", "runtime_error", None, "would be called RuntimeError, as another name"),
        ("export_format", "temporary_directory", None, "such as my_temporary_directory"),
        ("architecture", "llama_config", "no_known_type", "would be called LlamaConfig"),
        ("architecture", "own", "llama", "models of type 'llama' are served by prunekit"),
        ("architecture", "own", "gemma3", "models of type 'gemma3' also read images"),
        ("architecture", "own", 'a"b', "is not a model type"),
        ("architecture", "own", "whisper", "no small model of type 'whisper' can be made (ValueError: embed_dim must"),
        ("architecture", "own", "bert", "have not one attention and one MLP each; write the family by hand"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, monkeypatch, kind, name, model_type, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        write_package(kind, name, None, model_type)
    assert said in str(caught.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scorers", "own"), "no template is called 'scorers' (did you mean 'scorer'?); there are allocator, "),
        (("architecture", "own"), "an architecture needs --model-type TYPE"),
        (("scorer", "own", "--model-type", "llama"), "--model-type is for architectures, and this is a new scorer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(command, arguments, said):
    code, output = command("new", *arguments)
    assert code == 2 and said in output


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SpecError, match="cannot be written: No space left on device"):
        write_package("scorer", "own", tmp_path / "a" / "own")
    assert os.listdir(tmp_path) == []
