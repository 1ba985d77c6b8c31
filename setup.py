"""Builds qft._native with CMake. Needs a C++17 compiler, no torch; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class BuildNative(build_ext):
    """Configure and build with CMake and Ninja, then put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        # named at every build: the one that an isolated build environment had is gone with it
        ninja = [f"-DCMAKE_MAKE_PROGRAM={path}"] if (path := shutil.which("ninja")) else []
        configure = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *ninja]
        subprocess.run(["cmake", *configure], check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (module,) = build.glob("_native*.so")
        shutil.copy2(module, f"{target}.new")
        os.replace(f"{target}.new", target)  # a process that has the old one loaded keeps it whole


class BuildPython(build_py):
    """Carry the kernel templates along: qft.compile builds formats from them at run time."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "qft" / "csrc", dirs_exist_ok=True)


setup(ext_modules=[Extension("qft._native", sources=[])], cmdclass={"build_ext": BuildNative, "build_py": BuildPython})
