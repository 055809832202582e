"""The gateway as a rollout sees it: shares of the traffic by version, and what became of the requests."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from online.rollout.seen import VersionCounters
from runtime.beside import name_beside
from runtime.errors import InputError, ServerFault, Unavailable
from runtime.settings import ADMIN_HEADER, ServerSettings

_PATH = "/control/versions"
_ANSWER_BYTES = 1 << 20
_TURN_S = 0.1


class GatewayDoor:
    """A gateway whose server has versions beside each other (see `TritonVersions`). Asks it anew each time, so it may
    be started again meanwhile; then everything goes to the main version until the next `route`."""

    def __init__(
        self,
        url: str,
        secret: str,
        repository: Path,
        *,
        slo_s: float | None = None,
        ca_file: Path | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """`url`: `http://127.0.0.1:8080`; `secret`: what is in its `--control-secret-file`; `repository`: what its
        server serves; `slo_s`: a request that takes longer counts as slow; `ca_file`: whom https is to be signed by."""
        if not url.startswith(("http://", "https://")):
            raise InputError(
                "gateway", got=url, expected="http://HOST:PORT or https://HOST:PORT", fix="give such a URL"
            )
        if slo_s is not None and not 0 < slo_s < 3600:
            raise InputError("slo_s", got=slo_s, expected="seconds, above 0 and below 3600", fix="give the SLO's")
        self._url, self._secret, self._repository = url.rstrip("/"), secret, repository
        self._slo_s, self._timeout_s = slo_s, timeout_s
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # nobody between us and it
        if ca_file is not None:
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(ca_file))))
        self._opener = urllib.request.build_opener(*handlers)

    def route(self, shares: Mapping[int, float], mirror: int | None) -> None:
        """Holds for every request that comes after the return. Asking again for the same changes nothing. Raises
        ServerFault for a version that is not loaded, Unavailable when the gateway does not answer."""
        state = self._ask("GET")
        main = _main(state)
        model = ServerSettings.load(self._repository).ensemble
        wanted = {version: share for version, share in shares.items() if share > 0}
        beside = {version for version in (*wanted, *(() if mirror is None else (mirror,))) if version != main}
        asked = {
            "weights": {str(version): share for version, share in wanted.items()},
            "versions": {str(version): {"model": name_beside(model, version)} for version in sorted(beside)},
            "mirror": None if mirror is None else str(mirror),
            "slow_s": self._slo_s,
        }
        if not _holds(state, asked):
            self._ask("PUT", asked)

    def counters(self) -> Mapping[int, VersionCounters]:
        """Since the door's start: requests that were dealt out by chance, and copies."""
        return {int(number): _counted(told) for number, told in self._ask("GET")["versions"].items()}

    def shares(self) -> dict[int, float]:
        """Of the traffic, by version."""
        return {int(number): told["share"] for number, told in self._ask("GET")["versions"].items()}

    def await_left(self, version: int, limit_s: float) -> None:
        """Until the requests that went to a version beside, before it was named no more, have ended. Returns as well
        when they take longer than that."""
        end = time.monotonic() + limit_s
        while self._ask("GET")["leaving"].get(str(version), 0) and time.monotonic() < end:
            time.sleep(_TURN_S)

    def _ask(self, method: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {ADMIN_HEADER: self._secret, "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{_PATH}", data, headers, method=method)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                return json.loads(answer.read(_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            said = error.read(4096).decode(errors="replace").strip()
            if error.code == 403:
                fix = "give what is in the gateway's --control-secret-file"
                raise InputError("control secret", got="another one", expected="the gateway's", fix=fix) from error
            if error.code == 404:
                fix = "start the gateway with --control-secret-file"
                raise InputError(
                    self._url, got="no /control/versions", expected="a gateway with control", fix=fix
                ) from error
            fault = ServerFault if error.code in (400, 409) else Unavailable
            raise fault(f"the gateway at {self._url}: {error.code} {said}") from error
        except (OSError, ValueError) as error:
            raise Unavailable(f"the gateway at {self._url} does not answer: {error}") from error


def _main(state: Mapping[str, Any]) -> int:
    return next(int(number) for number, told in state["versions"].items() if told["main"])


def _holds(state: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether it is so already."""
    there = state["versions"]
    shares = {number: told["share"] for number, told in there.items() if told["share"] > 0}
    total = sum(asked["weights"].values())
    return (
        {number for number, told in there.items() if not told["main"]} == set(asked["versions"])
        and shares.keys() == asked["weights"].keys()
        and all(abs(shares[number] - weight / total) < 1e-9 for number, weight in asked["weights"].items())
        and (state["mirror"], state["slow_s"]) == (asked["mirror"], asked["slow_s"])
    )


def _counted(told: Mapping[str, Any]) -> VersionCounters:
    dealt, mirrored = told["dealt"], told["mirrored"]
    return VersionCounters(
        requests=dealt["requests"] + mirrored["requests"],
        errors=dealt["errors"] + mirrored["errors"],
        slow=dealt["slow"] + mirrored["slow"],
        scores=tuple(told["scores"]),
    )
