"""Our CUDA kernels as a C++ library, to run them where there is no GPU: slowly, but as they are written."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from crowdlayer.learning.kernels import making

SHIM = Path(__file__).with_name("cuda.h")
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s+(\w+)\((.*?)\) \{', re.DOTALL)
CONVERSION = re.compile(r'asm\("cvt\.rn\.bf16x2\.f32 .*?\);', re.DOTALL)


class Emulated:
    """A kernel, called as torch calls them."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._launch = library[f"launch_{name}"]
        self.launches = 0

    def __call__(
        self, blocks: Sequence[int], threads: Sequence[int], arguments: Sequence[making.Argument], early: bool
    ) -> None:
        self.launches += 1
        given = [(ctypes.c_int * 3)(*blocks), (ctypes.c_int * 3)(*threads)]
        self._launch(*given, *map(making._value, arguments))


def emulated(folder: Path, compiler: str) -> dict[str, Emulated]:
    """The kernels by their names."""
    source = making.source()
    found: list[tuple[str, str]] = KERNEL.findall(source)
    source, n = CONVERSION.subn("to.pair[i] = two_rounded(from[2 * i + 1], from[2 * i]);", source)
    assert n == 1
    assert [name for name, _ in found] == making.KERNEL.findall(source)
    parts = [f'#include "{SHIM}"', source]
    for name, parameters in found:
        names = ", ".join(re.split(r"[\s*]+", part.strip())[-1] for part in parameters.split(","))
        parts.append(
            f'extern "C" void launch_{name}(const int* blocks_, const int* threads_, {parameters})'
            f" {{ launch(blocks_, threads_, [=] {{ {name}({names}); }}); }}"
        )
    (folder / "kernels.cpp").write_text("\n".join(parts))
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *options, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    return {name: Emulated(library, name) for name, _ in found}
