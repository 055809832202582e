"""The Triton behind the gateway, as a rollout sees it: versions loaded beside each other, each proven before it counts.

What is promoted takes the place of the old version under the model's own name, so that a restart comes back with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from online.serving.door import GatewayDoor
from runtime.beside import laid_out_beside, lay_out_beside, names_beside, take_away_beside
from runtime.channel import connect
from runtime.errors import BadEnvironment, NotProven, ServerFault, Unavailable
from runtime.model_config import CONFIG, pin
from runtime.model_control import load, not_ready, unload
from runtime.proof.proving import Prover, Watch
from runtime.server.model_port import GrpcPort
from runtime.settings import ServerSettings

_TURN_S = 0.2
_ASK_S = 10.0


class TritonVersions:
    """One server that was started with model control (`trireme serve --model-control`), and its gateway."""

    def __init__(
        self,
        grpc_address: str,
        secret: str,
        repository: Path,
        door: GatewayDoor,
        *,
        settings_of: Callable[[int], ServerSettings | None] | None = None,
        load_s: float = 300.0,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`secret`: what is in the server's control secret file; `repository`: what it serves, which holds the files of
        both versions; `settings_of`: what a version was published with, None where nobody knows; without it, the newest
        version of the repository is known alone. `load_s`: for each load, and for a server that starts again."""
        self._address, self._secret, self._repository, self._door = grpc_address, secret, repository, door
        self._settings_of = settings_of or (lambda version: _newest(repository, version))
        self._load_s, self._report = load_s, report
        self._proven: set[int] = set()

    def load(self, version: int) -> None:
        """Beside what is loaded. Returns when it is ready and proven. Raises ServerFault when it is not, Unavailable
        while there is no server."""
        with self._triton() as client:
            main = self._main(client)
            if main == version:
                return  # as its supervisor has proven it
            settings = self._settings(version)
            names = names_beside(settings)
            if not_ready(client, names, version):
                self._proven.discard(version)
                self._load(client, settings)
            if version not in self._proven:
                try:
                    self._prove(client, settings, names[-1])
                except BaseException:
                    self._take_away(client, version)
                    raise

    def unload(self, version: int) -> None:
        """From the model's own name it goes when another one, which was promoted, has taken its place."""
        with self._triton() as client:
            main = self._main(client)
            if main == version:
                main = self._replace(client, version)
            else:
                self._door.await_left(version, self._load_s)
                self._take_away(client, version)
            if laid_out_beside(self._repository, main):  # also where whoever began this did not come so far
                self._door.route({main: 1.0}, None)
                self._door.await_left(main, self._load_s)
                self._take_away(client, main)
                self._report(f"version {main} serves under the model's own name; a restart comes back with it")

    def _replace(self, client: Any, old: int) -> int:
        """Nobody is asking the model by its own name: all requests go to the version that is promoted. It is loaded a
        second time, in place of the old one. Returns its number."""
        new = self._promoted(old)
        settings = self._settings(new)
        for model in settings.models:
            pin(self._repository / model / CONFIG, new)
        settings.save(self._repository)
        load(client, settings.load_order, self._secret, self._load_s)
        missing = not_ready(client, settings.load_order, new)
        if missing:
            raise ServerFault(f"{', '.join(missing)} has no version {new} after the load")
        self._prove(client, settings, settings.ensemble)
        return new

    def _promoted(self, old: int) -> int:
        shares = self._door.shares()
        new = [version for version, share in shares.items() if share > 0]
        if len(new) != 1 or new[0] == old:
            raise ServerFault(f"version {old} serves; requests go to {shares}, so nothing can take its place")
        return new[0]

    def _load(self, client: Any, settings: ServerSettings) -> None:
        from tritonclient.utils import InferenceServerException

        names = names_beside(settings)
        try:
            lay_out_beside(self._repository, settings)
        except (BadEnvironment, OSError) as error:
            raise ServerFault(f"version {settings.version} cannot be laid out: {error}") from error
        self._report(f"loading version {settings.version} beside")
        try:
            load(client, names, self._secret, self._load_s)
        except InferenceServerException as error:
            self._require_there(client)
            self._take_away(client, settings.version)
            raise ServerFault(f"version {settings.version}: Triton: {error.message()}") from error

    def _prove(self, client: Any, settings: ServerSettings, name: str) -> None:
        def port(of: ServerSettings) -> GrpcPort:
            return GrpcPort(client, name, of.version, cached=of.response_cache_bytes > 0)

        from tritonclient.utils import InferenceServerException

        prover = Prover(self._repository, port, lambda version: settings, Watch(report=self._report))
        try:
            prover.prove(settings.version)
        except InferenceServerException as error:
            self._require_there(client)
            raise NotProven(f"version {settings.version} does not answer its proof: {error.message()}") from error
        self._proven.add(settings.version)
        self._report(f"version {settings.version} is proven on this machine: {prover.proven}")

    def _take_away(self, client: Any, version: int) -> None:
        self._proven.discard(version)
        unload(client, laid_out_beside(self._repository, version), self._secret, self._load_s)
        take_away_beside(self._repository, version)

    def _settings(self, version: int) -> ServerSettings:
        found = self._settings_of(version)
        if found is None:
            raise ServerFault(f"{self._repository}: nobody knows what version {version} was published with")
        return found

    def _main(self, client: Any) -> int:
        """The version under the model's own name. Waits for a server that starts again."""
        from tritonclient.utils import InferenceServerException

        model = ServerSettings.load(self._repository).ensemble
        end = time.monotonic() + self._load_s
        while True:
            try:
                return max(int(one) for one in client.get_model_metadata(model, client_timeout=_ASK_S).versions)
            except (InferenceServerException, ValueError) as error:
                if time.monotonic() >= end:
                    raise Unavailable(f"{model} at {self._address} does not answer: {error}") from error
            time.sleep(_TURN_S)

    def _require_there(self, client: Any) -> None:
        """A server that went away says nothing of the version. Raises Unavailable."""
        from tritonclient.utils import InferenceServerException

        try:
            there = client.is_server_live(client_timeout=_ASK_S)
        except InferenceServerException:
            there = False
        if not there:
            raise Unavailable(f"Triton at {self._address} went away")

    @contextmanager
    def _triton(self) -> Iterator[Any]:
        """Raises ServerFault with Triton's own words, Unavailable when it is there no more."""
        from tritonclient.utils import InferenceServerException

        client = connect(self._address)
        try:
            yield client
        except InferenceServerException as error:
            self._require_there(client)
            raise ServerFault(f"Triton at {self._address}: {error.message()}") from error
        finally:
            client.close()


def _newest(repository: Path, version: int) -> ServerSettings | None:
    settings = ServerSettings.load(repository)
    return settings if settings.version == version else None
