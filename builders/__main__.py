"""The CLI `trireme`: its commands, and the only place that turns errors into exit codes.

Exit codes: 0 done; 1 a check failed, with the figures; 2 the user's input is wrong, with what to do.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import typer

from builders.commands import building, cluster, compressing, generating, manifests, partitioning, searching, service
from builders.commands.federating import federate
from builders.commands.online import online
from builders.commands.options import fail
from builders.commands.plan import plan
from builders.errors import InputError, TriremeError
from runtime.heard import hear_signals

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a transformer checkpoint to a Triton deployment, each step checked by numbers.",
)
for command in (
    plan,
    building.build,
    compressing.compress,
    compressing.compare,
    searching.search,
    building.export,
    building.quantize,
    building.engine,
    building.package,
    partitioning.shard,
    partitioning.verify,
    service.serve,
    service.loadtest,
    service.report,
    generating.generate,
    manifests.manifests,
    manifests.lint_manifests,
    manifests.publish,
    cluster.deploy,
    cluster.diff,
    cluster.undo,
    cluster.port_forward,
    cluster.load_version,
):
    app.command()(command)
app.command("status")(cluster.cluster_status)
online.add_typer(federate, name="federate")
app.add_typer(online, name="online")


def run(command: Callable[[], object]) -> None:
    """Runs a command and turns errors into exit codes. Anything else is a fault of ours, and shows its stack.

    SIGTERM ends a command as Ctrl-C does, so that whatever it started is stopped; `serve` drains instead.
    """
    # torch's threads sleep while they wait for each other. They would spin, which on a busy machine takes more than
    # half of the CPU time that a training is given. Read when torch is loaded, which no command has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hear_signals()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        command()
    except TriremeError as error:
        fail(str(error), error.exit_code)
    except OSError as error:  # a path of the user's that cannot be read or written
        fail(f"{error.filename or 'input/output'}: {error.strerror or error}", InputError.exit_code)


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
