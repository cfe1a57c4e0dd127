"""What minimath promises to run on: Pythons, dependency ranges, and machines where optional libraries are missing."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from toy import load

from minimath.config.schema import SFTConfig
from minimath.models.forward import base_causal_lm

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# imported, but named by no line of setup.py: which dependency brings it
BROUGHT_BY = {"packaging": "transformers", "huggingface_hub": "transformers", "pyarrow": "datasets",
              "latex2sympy2_extended": "math_verify"}
IMPORT_NAMES = {"pyyaml": "yaml", "math-verify": "math_verify", "liger-kernel": "liger_kernel"}
NOT_OURS_TO_INSTALL = {"vllm"}  # rollout=vllm says how; it pins its own torch

# Packages that a machine may lack are absent here, metadata included, and a socket to anywhere is an error
WITHOUT = """
import importlib.machinery, importlib.metadata, pkgutil, socket, sys
ABSENT = {"triton", "bitsandbytes", "datasets", "wandb", "vllm"}
find_spec, from_name = importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name

def find_but_absent(name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else find_spec(name, path, target)

def distribution_but_absent(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)

def no_network(event, args):
    inet = event == "socket.__new__" and args[1] in (socket.AF_INET, socket.AF_INET6)
    if inet or event in ("socket.getaddrinfo", "socket.connect"):
        print("NETWORK", event, args[1:])
        raise OSError("no network")

importlib.machinery.PathFinder.find_spec = staticmethod(find_but_absent)
importlib.metadata.Distribution.from_name = distribution_but_absent
sys.addaudithook(no_network)
"""
IMPORT_ALL = WITHOUT + """
import importlib, minimath, minimath.kernels
from minimath.cli import main
for package in (minimath, minimath.kernels):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print("imported", module.name)
print("present", sorted((ABSENT | {"tensorboard", "trackio"}) & set(sys.modules)))
for words in sys.argv[1:]:
    sys.argv = ["minimath", *words.split()]
    print("status", words, main())
"""


@pytest.fixture(scope="session")
def metadata(tmp_path_factory):
    """The metadata that setup.py gives today; an installed copy may be older."""
    folder = tmp_path_factory.mktemp("metadata")
    build = ("import sys; from setuptools import build_meta; "
             "build_meta.prepare_metadata_for_build_wheel(sys.argv[1])")
    # in the checkout, where the folder kernels/ is; nothing is written there
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    [found] = folder.glob("*.dist-info")
    return importlib.metadata.PathDistribution(found)


def wanted(metadata) -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires]


def pins(python: str, file: str = "constraints.txt") -> dict[str, str]:
    """Version of each package in a file of .ci under that Python."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / ".ci" / file).read_text().splitlines())
    rows = [Requirement(line) for line in lines if line]
    where = {"python_version": python, "platform_system": "Linux", "platform_machine": "x86_64"}
    return {canonicalize_name(row.name): str(row.specifier).removeprefix("==") for row in rows
            if not row.marker or row.marker.evaluate(where)}


def test_the_metadata_names_the_pythons_the_systems_and_the_licence(metadata):
    classifiers = metadata.metadata.get_all("Classifier")
    named = {c.rsplit(" ", 1)[1] for c in classifiers if re.match(r"Programming Language :: Python :: 3\.", c)}
    assert named == set(PYTHONS)
    allowed = SpecifierSet(metadata.metadata["Requires-Python"])
    assert all(f"{python}.0" in allowed for python in PYTHONS) and "3.9.18" not in allowed
    assert metadata.metadata["License"] == "Apache-2.0"
    assert "License :: OSI Approved :: Apache Software License" in classifiers
    assert "Operating System :: POSIX :: Linux" in classifiers and "Operating System :: MacOS" in classifiers


def test_this_python_is_one_of_those_named(metadata):
    assert sys.version_info[:2] >= (3, 10) and SpecifierSet(metadata.metadata["Requires-Python"]).contains(
        ".".join(map(str, sys.version_info[:3])))


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_pin_and_it_lies_in_the_range(metadata, python):
    pinned = pins(python)
    for need in wanted(metadata):
        name = canonicalize_name(need.name)
        assert name in pinned, f"{name}: no pin in .ci/constraints.txt for Python {python}"
        assert need.specifier.contains(pinned[name], prereleases=True), f"{name}=={pinned[name]} is not {need}"


def test_the_lower_bounds_are_the_versions_of_ci_oldest(metadata):
    """`bash .ci/run oldest` shows that they work; tests and comparisons may want newer packages."""
    bounds = {canonicalize_name(need.name): Version(part.version) for need in wanted(metadata)
              if not (need.marker and re.search(r'extra == "(test|bench)"', str(need.marker)))
              for part in need.specifier if part.operator == ">="}
    assert bounds == {name: Version(version) for name, version in pins("3.11", "oldest").items()}


def test_the_versions_of_the_first_card_lie_in_the_ranges(metadata):
    pinned = pins("3.11", "card")
    allowed = {canonicalize_name(need.name): need.specifier for need in wanted(metadata)}
    assert all(allowed[name].contains(version) for name, version in pinned.items())


def test_ci_runs_with_another_file_of_versions_and_refuses_one_that_is_not_there():
    done = subprocess.run(["bash", ROOT / ".ci/run", "newest"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no such file of versions: .ci/newest" in done.stderr


@pytest.mark.parametrize("asked, seen", [("", ""), ("cpu", ""), ("1", "0,1")])
def test_tests_see_a_card_only_where_that_was_asked_for(asked, seen):
    code = "import conftest, os, sys; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, timeout=60,
                          env=os.environ | {"MINIMATH_TEST_CUDA": asked, "CUDA_VISIBLE_DEVICES": "0,1"})
    assert done.stdout == f"{seen!r} False\n", done.stderr


@pytest.mark.slow
def test_the_tests_of_a_card_run_on_a_cpu():
    """Nothing else runs them where there is no card."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/cuda"], cwd=ROOT, capture_output=True,
                          text=True, timeout=900, env=os.environ | {"MINIMATH_TEST_CUDA": "cpu"})
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


def test_a_library_that_may_break_us_with_its_next_major_has_an_upper_bound(metadata):
    unbounded = {need.name for need in wanted(metadata)
                 if not any(part.operator in ("<", "<=", "==") for part in need.specifier)}
    assert unbounded <= {"pytest", "hypothesis", "xllamacpp", "cut-cross-entropy"}  # of tests and comparisons only


def imported_packages() -> dict[str, set[str]]:
    """Top-level package -> the files that import it, of all that is installed."""
    found: dict[str, set[str]] = {}
    for file in [*(ROOT / "minimath").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(file.name)
    return {name: files for name, files in found.items() if name not in {*sys.stdlib_module_names, "minimath"}}


def test_every_package_that_is_imported_is_a_dependency_or_comes_with_one(metadata):
    needs = {IMPORT_NAMES.get(need.name, need.name) for need in wanted(metadata)}
    for name, files in imported_packages().items():
        if name in needs or name in NOT_OURS_TO_INSTALL:
            continue
        carrier = BROUGHT_BY.get(name)
        assert carrier in needs, f"{name} is imported in {files}, and nothing installs it"
        brings = {canonicalize_name(Requirement(line).name) for line in importlib.metadata.requires(carrier)}
        assert canonicalize_name(name) in brings, f"{carrier} no longer brings {name}, imported in {files}"


def test_without_optional_libraries_and_network_all_modules_import_and_doctor_says_what_is_missing(tmp_path):
    words = ["--help", "doctor device=cpu dtype=fp32"]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *words], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NETWORK" not in done.stdout and "present []" in done.stdout
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "minimath").rglob("*.py")} | \
        {f"minimath.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")}
    assert len(modules) > 60
    imported = set(re.findall(r"^imported (\S+)", done.stdout, re.MULTILINE))
    assert {m for m in modules if "__" not in m} <= imported
    assert "status --help 0" in done.stdout
    report = " ".join(done.stdout.split())
    assert "status doctor device=cpu dtype=fp32 0" in report and "all that would be used works" in report
    for name, use in (("triton", "CUDA and ROCm"), ("bitsandbytes", "quant=nf4"), ("datasets", "hub data sets")):
        assert re.search(rf"{name} note not installed: pip install '{name}[^']*', for [^']*{use}", report), name
    assert "vllm - not installed, for rollout=vllm" in report
    assert "wandb - not installed, for trackers=wandb" in report


NEEDS_MISSING = {  # options -> what is said about the library that they need
    "model={model} data={data} quant=nf4": "quant=nf4 needs bitsandbytes: pip install bitsandbytes",
    "model={model} data={data} optimizer=adamw8bit": "pip install bitsandbytes",
    "model={model} data={data} trackers=wandb": "pip install wandb",
    "model={model} data=owner/name": "pip install datasets",
}
RUN_EACH = WITHOUT + """
from minimath.cli import main
for words in sys.argv[1:]:
    sys.argv = ["minimath", "sft", *words.split()]
    sys.stderr.write(f"status {main()}\\n")
"""


def test_an_option_whose_library_is_missing_says_so_in_one_line(tmp_path, tiny_dir):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"problem": "2 + 3?", "solution": "2 + 3 = 5. \\\\boxed{5}"}\n')
    lines = [f"{words} device=cpu out=run{number}".format(model=tiny_dir, data=data)
             for number, words in enumerate(NEEDS_MISSING)]
    done = subprocess.run([sys.executable, "-c", RUN_EACH, *lines], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said = re.findall(r"^error: (.*)\nstatus 2$", done.stderr, re.MULTILINE)
    assert len(said) == len(NEEDS_MISSING), done.stderr
    for line, words in zip(said, NEEDS_MISSING.values(), strict=True):
        assert words in line


@pytest.mark.parametrize("new_name", [True, False], ids=["transformers from 5.23", "before"])
def test_activations_are_checkpointed_by_the_name_that_transformers_has_without_a_warning(tiny_dir, monkeypatch,
                                                                                          new_name):
    from transformers import LlamaForCausalLM
    if not new_name and hasattr(LlamaForCausalLM, "activation_checkpointing_enable"):
        monkeypatch.setattr(LlamaForCausalLM, "activation_checkpointing_enable", None)
        monkeypatch.setattr(LlamaForCausalLM, "gradient_checkpointing_enable",
                            LlamaForCausalLM._activation_checkpointing_enable)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpointing_enable", category=FutureWarning)
        model, _ = load(tiny_dir, SFTConfig, train=True, gradient_checkpointing=True)
    layers = base_causal_lm(model).model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    assert all(layer._gradient_checkpointing_func.keywords == {"use_reentrant": False} for layer in layers)
