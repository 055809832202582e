"""`make gpu-proof`: what is true on this GPU, and what its limit is. `--dry` runs the same script on a CPU.

Writes `<out>/<gpu>-<date>/` with proof.json, README.md and plots, also where a signal ends it half-way. Exit codes: 0
every section ran, or could not for a reason that is stated; 1 a section failed; 2 no GPU, or a result of this name is
there already; 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from builders.errors import CheckError, InputError, MachineError, TriremeError
from measure.gpu_proof import page, setting
from measure.gpu_proof.machine import gpu_facts, processor_name
from measure.gpu_proof.record import Proof, Section
from measure.gpu_proof.sections import ENDED, Part, run_parts
from measure.gpu_proof.setting import FLAVOURS, Setting
from runtime.gpu import visible_targets
from runtime.heard import hear_signals

BUDGET_S = 450.0  # of the eight minutes that a proof may take: the rest is for starting, the last case and writing
DRY_BUDGET_S = 1800.0  # of a CPU, which may be a busy one
# By worth: what is told with the least time comes first, then what only this machine can tell. The limits are what all
# else is held against. The first number is the most seconds, so that there is time for the sections behind; the second
# the least. Once for each flavour of TensorRT: {}.
_PARTS = (
    ("machine", "machine:describe", 30, 5),
    ("limits", "machine:limits", 30, 5),
    ("TensorRT, {}", "machine:one_layer", 30, 10),
    ("decoders", "decoders:measure", 140, 20),
    ("decoder engines, {}", "decoder_engines:measure", 150, 40),
    ("encoders", "encoders:measure", 90, 15),
    ("engines, {}", "encoders:measure_engines", 90, 30),
    ("served, {}", "served:measure", 120, 40),
    ("several GPUs", "machine:all_reduces", 40, 15),
    ("ranks", "served:ranks", 120, 40),
)


def parts(*, dry: bool = False) -> list[Part]:
    """A busy CPU takes what time it takes: the dry run has a budget alone."""
    each: list[tuple[str, ...]] = [(flavour,) for flavour in FLAVOURS]
    return [
        Part(name.format(*given), f"measure.gpu_proof.{function}", DRY_BUDGET_S if dry else most_s, least_s, given)
        for name, function, most_s, least_s in _PARTS
        for given in (each if "{}" in name else [()])
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu-proof", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="on this CPU, with tiny shapes: proves the script")
    parser.add_argument("--out", type=Path, help="the result is a new folder in it (docs/gpu; dry: a temporary one)")
    parser.add_argument(
        "--budget-s", type=float, help=f"seconds for all sections ({BUDGET_S:g}; dry: {DRY_BUDGET_S:g})"
    )
    parser.add_argument("--json", action="store_true", help="print proof.json instead of the page")
    options = parser.parse_args(arguments)
    dry, budget_s = options.dry, options.budget_s or (DRY_BUDGET_S if options.dry else BUDGET_S)
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as scratch:
        chosen = setting.dry(Path(scratch)) if dry else Setting(Path(scratch), require_gpu())
        device = processor_name() if dry else gpu_facts()[0]["name"]
        out = options.out or Path(tempfile.mkdtemp(prefix="gpu-proof-dry-") if dry else "docs/gpu")
        folder = new_folder(out, "dry-run" if dry else device)
        wanted, done = parts(dry=dry), list[Section]()
        try:
            for section in run_parts(wanted, chosen, budget_s):
                done.append(section)
                told = f"{section.seconds:6.1f} s  {section.name}: {section.status} {section.reason}"
                print(told.rstrip(), file=sys.stderr)
        finally:  # what was measured until a signal came is written, too
            ended = (Section(part.name, "not run", ENDED) for part in wanted[len(done) :])
            proof = Proof(_today(), device, dry, budget_s, (*done, *ended))
            text = write(proof, folder) if done else ""
    print(proof.to_json() if options.json else text, end="")
    if proof.failed:
        raise CheckError("; ".join(f"section {each.name} failed: {each.reason}" for each in proof.failed))


def require_gpu() -> str:
    """SM of the first GPU. Raises MachineError without one."""
    if targets := visible_targets():
        return targets[0]
    raise MachineError(
        "GPU of this machine", got="none: nvidia-smi is not there, or names no GPU",
        expected="an NVIDIA GPU and its driver",
        fix="run it on a machine with a GPU (make gpu-bundle makes a folder to carry there), or make gpu-proof-dry",
    )  # fmt: skip


def new_folder(out: Path, device: str) -> Path:
    """`<out>/<device>-<date>`. Raises InputError where there is one of today: a result is never written over."""
    folder = out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{_today()}"
    if folder.exists():
        raise InputError(
            f"result {folder}", got="a folder that is there already", expected="none of this name",
            fix="move it away, or give another --out",
        )  # fmt: skip
    return folder


def write(proof: Proof, folder: Path) -> str:
    """The figures first, which took minutes of a GPU; a drawing that fails costs the drawing. Returns the page."""
    folder.mkdir(parents=True)
    (folder / "proof.json").write_text(proof.to_json())
    plots, note = dict[str, str](), ""
    try:
        plots = page.draw(proof)
    except Exception as error:  # noqa: BLE001 - the page says why, and can be drawn again from the figures
        note = f"No plots: {type(error).__name__}: {error}"
    for name, svg in plots.items():
        (folder / f"{name}.svg").write_text(svg)
    text = page.render(proof, tuple(plots), note)
    (folder / "README.md").write_text(text)
    print(f"written to {folder}", file=sys.stderr)
    return text


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _leave(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # what this one makes us write is not cut short by a second
    sys.exit(128 + number)


if __name__ == "__main__":
    hear_signals()
    signal.signal(signal.SIGTERM, _leave)
    try:
        main()
    except TriremeError as error:  # to exit codes as the CLI has them, without the packages that the CLI needs
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
