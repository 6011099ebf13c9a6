"""Build hook: on x86-64 Linux with a C++ compiler, a wheel carries the kernels compiled. Without, it carries their source."""

import importlib.util
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Adds `ufbert/ops/native/kernels-KEY-CHECKSUM.so` and the wheel's platform."""

    def dependencies(self) -> list[str]:
        """List what compiling needs: jaxlib, for its headers, in the version that will call the kernels."""
        known = self.metadata.core.dependencies if self._reason_for_source(self._compiler_module()) == "" else []
        bounds = [name.removeprefix("jax") for name in known if re.match(r"jax[<>=]", name)]
        return [f"jaxlib{bound}" for bound in bounds]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels into a wheel (`version` is standard); an editable install compiles them on first use."""
        if version == "editable":
            return
        native = self._compiler_module()
        reason = self._reason_for_source(native)
        if not reason:
            try:
                self._add(native, build_data)
                return
            except native.CannotBuild as error:
                reason = str(error)
        self.app.display_warning(f"the wheel carries the source of the kernels only: {reason}")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the library, which is in the wheel now."""
        if scratch := getattr(self, "_scratch", None):
            scratch.cleanup()

    def _add(self, native: ModuleType, build_data: dict[str, Any]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="ufbert-kernels-")
        library = Path(self._scratch.name) / "kernels.so"
        self.app.display_info(f"compiling the CPU kernels (about {native.CPU_SECONDS} s of one core)")
        native.compile_to(library, native.compiler(), native.STAND_ALONE)
        with library.open("rb") as file:
            name = f"kernels-{native.source_key()}-{native.checksum(file)}.so"
        build_data["force_include"][str(library)] = f"ufbert/ops/native/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(library.read_bytes())}"

    def _compiler_module(self) -> ModuleType:
        """Load the file that compiles, without the package around it, whose libraries are not installed here."""
        path = Path(self.root) / "ufbert" / "ops" / "native" / "compiler.py"
        spec = importlib.util.spec_from_file_location("ufbert_native_compiler", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _reason_for_source(self, native: ModuleType) -> str:
        """Say why a wheel that is built here carries no compiled kernels; an empty string if it can."""
        if os.environ.get("UFBERT_WHEEL_KERNELS") == "0":
            return "UFBERT_WHEEL_KERNELS is 0"
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return "they are shipped for Linux on x86-64"
        try:
            native.compiler()
        except native.CannotBuild as error:
            return str(error)
        return ""


def platform_tag(library: bytes) -> str:
    """Return the platform that a library for x86-64 needs: the newest version of glibc whose functions it calls."""
    versions = [int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", library)]
    return f"manylinux_2_{max(versions)}_x86_64" if versions else "linux_x86_64"
