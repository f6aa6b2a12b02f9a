"""Bridge from pip to CMake: configures, builds and installs what CMakeLists.txt defines.

Metadata lives in pyproject.toml. Without a C++ compiler the package installs without its library
and computes on the float64 reference.
"""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# pip does not look at [build-system] requires under --no-build-isolation, and an older setuptools
# rejects pyproject.toml with a message that names nothing useful.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit("churn_kernels: needs setuptools>=77 to build; run: pip install -U 'setuptools>=77'")


def find_compiler() -> str | None:
    """Path of the C++ compiler CMake would pick, or None."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    return next(filter(None, map(shutil.which, named or ["c++", "g++", "clang++"])), None)


def find_tool(name: str) -> str | None:
    """Path of a build tool, the one beside the building Python first, or None."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join(places))


def find_package(name: str) -> str | None:
    """Version and place of a Python package, without importing it, or None."""
    spec = importlib.util.find_spec(name)
    return spec and f"{importlib.metadata.version(name)} {spec.origin}"


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions; the libraries land in the package's folder."""

    def run(self) -> None:
        """Build and install, or say in one line why the library is left out."""
        if find_compiler() is None:
            print(
                "churn_kernels: no C++ compiler found (set CXX or install g++); installing without "
                "the compiled library, every loss runs on the slow reference",
                file=sys.stderr,
            )
            return
        needs = {name: find_tool(name) for name in ("cmake", "ninja")}
        needs["torch"] = find_package("torch")
        missing = [name for name, found in needs.items() if found is None]
        if missing:
            names = " ".join(missing)
            sys.exit(f"churn_kernels: the build needs {names}; run: pip install {names}")

        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        tree.mkdir(parents=True, exist_ok=True)
        # A tree configured for another Python, torch or tool starts over.
        found = f"{sys.executable}\n{needs}\n{find_package('pybind11')}"
        record = tree / "configured_for.txt"
        same = record.is_file() and record.read_text() == found
        configure = [needs["cmake"], "-S", ROOT, "-B", tree, "-G", "Ninja", "--log-level=WARNING"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={needs['ninja']}"]
        record.unlink(missing_ok=True)
        self.command(*configure, *([] if same else ["--fresh"]), stdout=subprocess.DEVNULL)
        record.write_text(found)

        package = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        self.command(needs["cmake"], "--build", tree)
        prefix = ["--prefix", package.resolve()]
        self.command(needs["cmake"], "--install", tree, *prefix, stdout=subprocess.DEVNULL)

    @staticmethod
    def command(*words: object, **options: object) -> None:
        """Run one build step; a failure ends the build without a traceback."""
        step = [str(word) for word in words]
        if subprocess.run(step, **options).returncode != 0:
            sys.exit(f"churn_kernels: this step of the build failed: {shlex.join(step)}")


SOURCES = [path.relative_to(ROOT) for path in ROOT.glob("csrc/**/*") if path.is_file()]

setup(
    # No sources for setuptools to compile; `depends` puts them into source distributions.
    ext_modules=[
        Extension(
            "churn_kernels._C",
            sources=[],
            depends=["CMakeLists.txt", *sorted(map(str, SOURCES))],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
