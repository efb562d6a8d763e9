# SPDX-License-Identifier: Apache-2.0
# Builds the native module against an installed libhalfstep, or the repository's own.
"""Where the library comes from, first match:

1. ``HALFSTEP_PREFIX``: what ``make install PREFIX=…`` filled; linked where it is.
2. The checkout that this folder lies in, if ``swift`` is on PATH (or ``HALFSTEP_LIBRARY`` names a
   library that is built already): built if needed and copied into the package.
3. ``pkg-config halfstep``; linked where it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
BUNDLED = "libhalfstep.so.0"  # the library's soname
SOURCES = sorted(f"native/{path.name}" for path in (HERE / "native").glob("*.c"))


class Library:
    """Flags for the compiler, and the file to bundle, if any."""

    def __init__(self, include: list[str], folders: list[str], bundle: Path | None = None):
        self.include = include
        self.folders = folders
        self.bundle = bundle


def find_library() -> Library:
    """Find or build libhalfstep; see the top of this file."""
    prefix = os.environ.get("HALFSTEP_PREFIX")
    if prefix:
        return Library([f"{prefix}/include"], [f"{prefix}/lib"])
    in_checkout = (REPOSITORY / "Package.swift").exists()
    built = os.environ.get("HALFSTEP_LIBRARY")
    if in_checkout and (built or shutil.which("swift")):
        path = Path(built) if built else build_library()
        if not path.exists():
            raise SystemExit(f"{path} does not exist")
        return Library([str(REPOSITORY / "include")], [], path)
    flags = pkg_config("--cflags", "--libs")
    if flags is None:
        raise SystemExit(
            "libhalfstep was not found: set HALFSTEP_PREFIX, install it where pkg-config finds it, "
            "or put swift on PATH to build it here"
        )
    return Library(
        [flag[2:] for flag in flags if flag.startswith("-I")],
        [flag[2:] for flag in flags if flag.startswith("-L")],
    )


def build_library() -> Path:
    """Build the repository's library as its Makefile does, and return its path."""
    command = ["swift", "build", "-c", "release", "--product", "HalfstepC"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    shown = subprocess.run(
        [*command[:4], "--show-bin-path"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    return Path(shown.stdout.strip()) / "libHalfstepC.so"


def pkg_config(*options: str) -> list[str] | None:
    """Ask pkg-config; None if it is absent or does not know the library."""
    try:
        done = subprocess.run(
            ["pkg-config", *options, "halfstep"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split()


class BuildNative(build_ext):
    """Adds what `find_library` found, and puts the library beside the module."""

    def build_extension(self, extension: Extension) -> None:
        library = find_library()
        extension.include_dirs += library.include
        if library.bundle:
            folder = Path(self.get_ext_fullpath(extension.name)).parent
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / BUNDLED
            aside = target.with_suffix(".new")  # never write into a file that is mapped
            shutil.copyfile(library.bundle, aside)
            if shutil.which("strip"):
                subprocess.run(["strip", "--strip-unneeded", str(aside)], check=True)
            os.replace(aside, target)
            extension.extra_link_args += [str(target), "-Wl,-rpath,$ORIGIN"]
        else:
            extension.libraries.append("halfstep")
            extension.library_dirs += library.folders
            extension.runtime_library_dirs += library.folders
        super().build_extension(extension)

    def copy_extensions_to_source(self) -> None:
        """Serve `build_ext --inplace` and editable installs: the library goes along."""
        super().copy_extensions_to_source()
        for extension in self.extensions:
            built = Path(self.build_lib, *extension.name.split(".")).with_name(BUNDLED)
            if built.exists():
                target = HERE / "src" / extension.name.split(".")[0] / BUNDLED
                aside = target.with_suffix(".new")
                shutil.copyfile(built, aside)
                os.replace(aside, target)


def version() -> str:
    """Return the version that the library's source states."""
    source = REPOSITORY / "Sources/Halfstep/Exports.swift"
    pattern = r'(?:versionText|halfstepVersion): \w+ = "([^"]+)"'
    found = source.exists() and re.search(pattern, source.read_text())
    return found.group(1) if found else "0.1.0"


setup(
    version=version(),
    ext_modules=[
        Extension(
            "halfstep._core",
            SOURCES,
            depends=[
                *sorted(f"native/{path.name}" for path in (HERE / "native").glob("*.h")),
                "../../include/halfstep.h",
            ],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
