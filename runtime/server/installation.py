"""Where Triton's pieces lie: in the nvidia-pytriton wheel, or in NVIDIA's container image."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BadEnvironment

_SYSTEM = Path("/opt/tritonserver")  # where NVIDIA's image keeps it


@dataclass(frozen=True)
class Installation:
    """`stub` is to be put beside the Python backend; None where it lies there."""

    server: Path
    backends: Path
    stub: Path | None
    caches: Path
    libraries: Path

    @staticmethod
    def find(system: Path = _SYSTEM) -> Installation:
        """The bundled server, else the system's. Raises BadEnvironment without either, or without a Python stub."""
        spec = importlib.util.find_spec("pytriton")
        if spec is not None and spec.submodule_search_locations:
            return Installation._bundled(Path(next(iter(spec.submodule_search_locations))))
        if (system / "bin" / "tritonserver").is_file():
            return Installation._of_the_system(system)
        raise BadEnvironment(
            f"no Triton: pip install nvidia-pytriton (Linux, Python 3.11 or 3.12), or use an image with {system}"
        )

    @staticmethod
    def _bundled(package: Path) -> Installation:
        root = package / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise BadEnvironment(f"the embedded Triton has no Python {version} stub; use Python 3.11 or 3.12")
        return Installation(
            server=root / "bin" / "tritonserver",
            backends=root / "backends",
            stub=stub,
            caches=root / "caches",
            libraries=package.parent / "nvidia_pytriton.libs",
        )

    @staticmethod
    def _of_the_system(root: Path) -> Installation:
        if not (root / "backends" / "python" / "triton_python_backend_stub").is_file():
            raise BadEnvironment(f"{root} has no Python backend; use an image whose tag ends in -py3")
        return Installation(
            server=root / "bin" / "tritonserver",
            backends=root / "backends",
            stub=None,
            caches=root / "caches",
            libraries=root / "lib",
        )

    def backend_folder(self, scratch: Path) -> Path:
        """The folder that the server is told of. It wants the stub of this Python beside the library."""
        if self.stub is None:
            return self.backends
        target = scratch / "backends" / "python"
        target.mkdir(parents=True)
        python = self.backends / "python"
        for source in (python / "libtriton_python.so", python / "triton_python_backend_utils.py", self.stub):
            shutil.copy(source, target / source.name)
        (target / self.stub.name).chmod(0o755)
        return target.parent

    def environment(self) -> dict[str, str]:
        """Of the server and, through it, of its stubs. Only the same user can read it, unlike a command line."""
        libraries = [str(self.libraries), str(sysconfig.get_config_var("LIBDIR"))]
        libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
        return {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PATH": f"{sys.exec_prefix}/bin:{os.environ.get('PATH', '')}",  # the stub finds its prefix by `python3`
            "PYTHONDONTWRITEBYTECODE": "1",  # a new __pycache__ looks like a changed model
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not take the cores from the other processes
        }
