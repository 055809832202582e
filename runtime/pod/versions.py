"""The model versions of one running pod: the one that has answered, and one that is laid out to be loaded.

A version is staged on request; the load itself is a gRPC call of whoever asked. Once the staged version has reproduced
its proof it is the proven one, and a restart comes back with it. Until then a restart, or a repair, goes back.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.errors import BadEnvironment
from runtime.pod.layout import Layout, lay_out_configs, lay_out_settings, lay_out_version
from runtime.pod.model_store import Publication, misfit, publications
from runtime.pod.node import Node
from runtime.proof.record import require_proof
from runtime.settings import ServerSettings


@dataclass
class Versions:
    """Asked by requests on the health port and by the supervisor, so by several threads."""

    model: str
    platform: str
    node: Node
    graph_digest: str
    layout: Layout
    report: Callable[[str], None]
    _proven: Publication | None = None
    _staged: Publication | None = None
    _refused: tuple[int, str] | None = None
    _state: threading.Lock = field(default_factory=threading.Lock)
    _staging: threading.Lock = field(default_factory=threading.Lock)  # held for as long as files are copied

    def restore(self) -> None:
        """Before the server starts: the repository as the init step or the last proven version left it.

        Raises BadEnvironment when the store no longer has it.
        """
        settings = ServerSettings.load(self.layout.into)
        offered = publications(self.layout.store, self.model, self.platform)
        found = [item for item in offered if item.content_digest == settings.content_digest]
        if not found:
            raise BadEnvironment(f"version {settings.version} of {self.model} has gone from {self.layout.store}")
        self._proven = found[0]
        self._remove_all_but(self._proven)
        lay_out_configs(self._proven, self.layout)

    def state(self) -> tuple[Publication, int | None]:
        """The proven version, and the number of the one that is staged."""
        with self._state:
            return self._require_proven(), self._staged.version if self._staged else None

    def staged(self) -> int | None:
        """The number of the version that is laid out and has not answered yet."""
        with self._state:
            return self._staged.version if self._staged else None

    def stage(self, version: int) -> Publication:
        """Lays the version out beside the one that serves. The next load brings it, and nothing else does.

        Raises BadEnvironment when the store does not offer it, or not for this node; then nothing has changed.
        """
        if not self._staging.acquire(blocking=False):
            raise BadEnvironment("another version is being laid out")
        try:
            proven = self._require_proven()
            if version == proven.version:
                return self.discard()
            wanted = self._find(version)
            require_proof(ServerSettings.load(wanted.folder(self.layout.store) / "repository"))
            self.discard()
            with self._state:
                self._refused = None
            self._remove_all_but(proven)
            lay_out_version(wanted, self.layout)
            with self._state:
                lay_out_configs(wanted, self.layout)
                self._staged = wanted
            return wanted
        finally:
            self._staging.release()

    def staged_settings(self, version: int) -> ServerSettings | None:
        """What the staged version was published with; None for any other."""
        with self._state:
            if self._staged is None or self._staged.version != version:
                return None
            return ServerSettings.load(self._staged.folder(self.layout.store) / "repository")

    def refusal(self, version: int) -> str | None:
        """Why the version was given up, if it was the last to be."""
        with self._state:
            return self._refused[1] if self._refused is not None and self._refused[0] == version else None

    def discard(self, reason: str = "") -> Publication:
        """Back to the proven version, which is returned: the next load brings it again. `reason`: why."""
        with self._state:
            proven = self._require_proven()
            if self._staged is not None:
                lay_out_configs(proven, self.layout)
                self.report(f"version {self._staged.version} is discarded; version {proven.version} is to serve")
                self._refused = (self._staged.version, reason) if reason else None
                self._staged = None
            return proven

    def answered(self, version: int) -> ServerSettings | None:
        """This version answers, and is proven. The settings, where it is the staged one."""
        with self._state:
            if self._staged is None or self._staged.version != version:
                return None
            settings = lay_out_settings(self._staged, self.layout)
            self._proven, self._staged = self._staged, None
        self.report(f"version {version} has answered; a restart comes back with it")
        return settings

    def _find(self, version: int) -> Publication:
        offered = publications(self.layout.store, self.model, self.platform)
        numbers = sorted({item.version for item in offered})
        same = [item for item in offered if item.version == version]
        if not same:
            raise BadEnvironment(f"the store has no version {version} of {self.model}; it has {numbers}")
        for item in same:
            if misfit(item, self.node, self.graph_digest) is None:
                return item
        raise BadEnvironment(f"version {version}: {misfit(same[0], self.node, self.graph_digest)}")

    def _require_proven(self) -> Publication:
        if self._proven is None:
            raise BadEnvironment("the server has not started yet")
        return self._proven

    def _remove_all_but(self, kept: Publication) -> None:
        for model in kept.models:
            for path in (self.layout.into / model).glob("[0-9]*"):
                if path.name != str(kept.version):
                    shutil.rmtree(path)
