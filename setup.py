"""Builds ``csrc/``: the Cython modules and the ONNX Runtime custom-op library. Everything else: pyproject.toml.

Every extension is optional: without a compiler the install still works, the package then runs the plain Python
tokenizer and the graph's function bodies, and says so once.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
OPS_LIBRARY = "cpmbee._ops"  # a plain shared library, loaded by path; nothing imports it
LINUX = sys.platform.startswith("linux")
CYTHON_FLAGS = ["-O3", "-g0", "-Wno-unreachable-code"]
SAME_EVERYWHERE = {"quantize": ["-ffp-contract=off"]}  # modules whose results must not depend on the machine
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=off",
]
CXX_LINK_FLAGS = [
    "-static-libstdc++",
    "-static-libgcc",
    "-Wl,-z,defs",
    f"-Wl,--version-script={CSRC / 'exports.map'}",
]


class BuildExtensions(build_ext):
    """Builds the op library as a plain shared library: no ``PyInit_`` symbol, no libpython, no ABI suffix."""

    def get_ext_filename(self, fullname: str) -> str:  # noqa: D102
        if fullname.rpartition(".")[2] == OPS_LIBRARY.rpartition(".")[2]:
            return os.path.join(*fullname.split(".")) + (".dll" if sys.platform == "win32" else ".so")
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:  # noqa: D102
        return ext.export_symbols if ext.name == OPS_LIBRARY else super().get_export_symbols(ext)


def sources(*patterns: str) -> list[str]:
    """Files of ``csrc/`` as setuptools wants them: relative, with slashes."""
    return sorted(path.as_posix() for pattern in patterns for path in CSRC.glob(pattern))


def cython_flags(source: str) -> list[str]:
    """Compiler flags of a Cython module."""
    return [*CYTHON_FLAGS, *SAME_EVERYWHERE.get(Path(source).stem, [])]


def extensions() -> list[Extension]:
    """The modules to build; sources are globbed so that a new op is one new file."""
    cython = [
        Extension(
            f"cpmbee._{Path(source).stem}",
            [source],
            depends=sources("*.h", "*.pxi"),
            include_dirs=[CSRC.as_posix()],
            extra_compile_args=cython_flags(source) if os.name == "posix" else [],
            optional=True,
        )
        for source in sources("*.pyx")
    ]
    ops = Extension(
        OPS_LIBRARY,
        sources("*.cc"),
        depends=sources("*.h"),
        include_dirs=[CSRC.as_posix()],
        language="c++",
        extra_compile_args=CXX_FLAGS if os.name == "posix" else ["/std:c++17", "/O2", "/EHsc"],
        extra_link_args=CXX_LINK_FLAGS if LINUX else [],
        optional=True,
    )
    return [*cython, ops]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
