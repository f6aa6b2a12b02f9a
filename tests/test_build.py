"""What the build promises: its facts, its constants, and a package that works without it."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch

import churn_kernels as ck
from churn_kernels import _backend, _ops, _version

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ck.__file__).parent

needs_library = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")


def tool(name):
    """Path of a build tool, the one beside this Python first; skips where there is none."""
    places = [sysconfig.get_path("scripts"), os.environ["PATH"]]
    found = shutil.which(name, path=os.pathsep.join(places))
    return found or pytest.skip(f"{name} is not installed")


def run(*command, folder=ROOT, **environment):
    """Run a command in a folder with the environment changed; None takes a variable away."""
    merged = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run(
        list(map(str, command)), env=merged, cwd=folder, capture_output=True, text=True, timeout=300
    )


@needs_library
class TestFacts:
    def test_build_info(self):
        info = ck.build_info()
        assert info["built"] is True
        assert re.fullmatch(r"\w+ \d+(\.\d+)+", info["compiler"])
        assert info["torch_target_version"] == "2.11"
        assert re.match(r"\d+\.\d+", info["torch_version"])
        assert info["cuda_architectures"] == []
        commit = info["git_commit"]
        assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)

    def test_instruction_sets(self):
        info = ck.build_info()
        assert info["instruction_sets"] in (["baseline", "avx2", "avx512"], ["neon"], ["baseline"])
        assert info["cpu_isa"] in info["instruction_sets"]
        assert info["detected_cpu_isa"] in info["instruction_sets"]

    def test_the_instruction_set_in_use(self):
        program = "import json, churn_kernels as ck; print(json.dumps(ck.build_info()))"
        weakest, *_ = ck.build_info()["instruction_sets"]
        for asked in (None, weakest):
            done = run(sys.executable, "-c", program, CHURN_CPU_ISA=asked)
            info = json.loads(done.stdout)
            assert info["cpu_isa"] == (asked or info["detected_cpu_isa"])
            assert info["detected_cpu_isa"] == ck.build_info()["detected_cpu_isa"]

    def test_names_no_path_of_the_building_machine(self):
        """Neither in the libraries nor in what an op says when it refuses its arguments."""
        libraries = sorted(PACKAGE.glob("*.so"))
        assert _ops.LIBRARY in libraries
        folders = {ROOT, Path(torch.__file__).parents[1], Path.home(), Path(sys.prefix)}
        for library in libraries:
            held = library.read_bytes()
            for folder in folders - {Path("/")}:
                assert bytes(folder) + b"/" not in held, library
            assert not re.findall(rb"\0/(?:[\w.+-]+/)+[\w.+-]+\.(?:cpp|h|hpp|cc)\b", held), library
        with pytest.raises(RuntimeError) as caught:
            torch.ops.churn_kernels.exact_round(torch.ones(2))
        assert re.fullmatch(
            r"check_words, csrc/op_inputs\.cpp:\d+, words must be what churn_kernels::exact_words "
            r"returned, or a sum of such",
            str(caught.value).partition("\n")[0],
        )

    def test_floating_point_flags(self):
        flags = ck.build_info()["flags"].split()
        assert "-ffp-contract=off" in flags
        assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations"} & set(flags)

    def test_constants(self):
        from churn_kernels._C import constants

        assert constants.kLanesFloat * 4 == constants.kLanesDouble * 8 == constants.kVectorBytes
        assert constants.kChunk % constants.kBlock == 0
        assert constants.kBlock % constants.kLanesFloat == 0

    @pytest.mark.skipif(sys.platform != "linux", reason="ELF")
    def test_offers_no_symbols(self):
        # An exported inline function of the AVX-512 variant could be bound by other libraries.
        symbols = run(tool("nm"), "--dynamic", "--defined-only", _ops.LIBRARY)
        assert symbols.returncode == 0, symbols.stderr
        assert symbols.stdout.strip() == ""


# An editable install would still offer the compiled module of its own tree.
ALONE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
"""


class TestVersion:
    def test_is_that_of_the_project(self):
        assert _version.version() == ck.__version__
        if (ROOT / "pyproject.toml").exists():
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert ck.__version__ == project["version"]
        else:
            assert ck.__version__ == importlib.metadata.version("churn-kernels")

    @pytest.mark.parametrize("checkout", [True, False])
    def test_of_an_unbuilt_copy(self, tmp_path, checkout):
        """A checkout has its own version, a bare folder that of what is installed."""
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(PACKAGE, tmp_path / "churn_kernels", ignore=ignored)
        project = "churn-kernels" if checkout else "another"
        text = f'[project]\nname = "{project}"\nversion = "7.8.9"\n'
        (tmp_path / "pyproject.toml").write_text(text)
        program = ALONE + "import churn_kernels as ck; print(ck.__version__, ck.__file__)"
        done = run(
            *(sys.executable, "-c", program),
            folder=tmp_path,
            PYTHONPATH=str(tmp_path),
            CHURN_BACKEND="reference",
        )
        assert done.returncode == 0, done.stderr
        version, file = done.stdout.split()
        assert Path(file).is_relative_to(tmp_path)
        try:
            installed = importlib.metadata.version("churn-kernels")
        except importlib.metadata.PackageNotFoundError:
            installed = "0+unknown"
        assert version == ("7.8.9" if checkout else installed)

    def test_costs_the_import_nothing(self):
        program = "import sys, churn_kernels; sys.exit('churn_kernels._version' in sys.modules)"
        assert run(sys.executable, "-c", program).returncode == 0

    def test_other_names_are_missing(self):
        with pytest.raises(AttributeError, match=r"^module 'churn_kernels' has no attribute 'nam"):
            _ = ck.name


class TestWithoutLibrary:
    PROGRAM = (
        ALONE
        + """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import churn_kernels as ck, torch
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.arange(5)
    for _ in range(2):
        loss = ck.codistillation_loss(logits, target, alpha=0.0, beta=0.0)
        loss.backward()
expected = sum(torch.nn.functional.cross_entropy(model, target) for model in logits)
print(json.dumps({
    "file": ck.__file__, "backends": ck.available_backends(), "info": ck.build_info(),
    "error": abs(loss.item() - expected.item()), "gradient": logits.grad.abs().sum().item(),
    "warnings": [str(w.message) for w in caught if "churn_kernels" in str(w.message)],
}))
"""
    )

    @pytest.fixture
    def package(self, tmp_path):
        """Folder of a copy of the package without its libraries."""
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(PACKAGE, tmp_path / "churn_kernels", ignore=ignored)
        return tmp_path

    def import_and_compute(self, package, backend):
        done = run(sys.executable, "-c", self.PROGRAM, folder=package, CHURN_BACKEND=backend)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert Path(report["file"]).is_relative_to(package)
        return report

    def test_falls_back_with_one_warning(self, package):
        report = self.import_and_compute(package, backend=None)
        assert len(report["warnings"]) == 1
        assert _backend.BUILD_COMMAND in report["warnings"][0]
        assert report["backends"] == ["reference"]
        assert report["info"] == {"built": False, "build_command": _backend.BUILD_COMMAND}
        assert report["error"] < 1e-6
        assert report["gradient"] > 0

    def test_a_chosen_reference_is_silent(self, package):
        assert self.import_and_compute(package, backend="reference")["warnings"] == []


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")
class TestBuild:
    def test_without_compiler_installs_without_library(self, tmp_path):
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path]
        done = run(*build, PATH=str(tmp_path), CXX=None)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("churn_kernels:")]
        assert len(said) == 1
        assert "no C++ compiler found" in said[0]
        assert list(tmp_path.iterdir()) == []

    def test_refuses_relaxed_floating_point(self, tmp_path):
        configure = [tool("cmake"), "-S", ROOT, "-B", tmp_path, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        done = run(*configure, CXXFLAGS="-ffast-math")
        assert done.returncode != 0
        assert "relaxed floating point" in " ".join(done.stderr.split())
