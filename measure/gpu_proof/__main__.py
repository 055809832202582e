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
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from builders.errors import CheckError, InputError, MachineError, TriremeError
from builders.store.atomic import atomic_directory
from measure.gpu_proof import page, setting
from measure.gpu_proof.machine import FLAVOURS, gpu_facts, processor_name
from measure.gpu_proof.record import Proof, Section
from measure.gpu_proof.sections import Part, run_parts
from measure.gpu_proof.setting import Setting
from runtime.gpu import visible_targets

BUDGET_S = 450.0  # of the eight minutes that a proof may take: the rest is for starting, the last case and writing
_HERE = "measure.gpu_proof"


def parts() -> tuple[Part, ...]:
    """By worth: what is told with the least time comes first, then what only this machine can tell.

    The limits are what all else is held against. Each `most_s` leaves time for the sections behind it.
    """

    def of_flavours(name: str, module: str, most_s: float, least_s: float, function: str = "measure") -> list[Part]:
        return [
            Part(f"{name}, {flavour}", f"{_HERE}.{module}", most_s, least_s, function, {"flavour": flavour})
            for flavour in FLAVOURS
        ]

    return (
        Part("machine", f"{_HERE}.machine", 30, function="describe"),
        Part("limits", f"{_HERE}.machine", 30, function="limits"),
        *of_flavours("TensorRT", "machine", 30, 10, "one_layer"),
        Part("decoders", f"{_HERE}.decoders", 140, 20),
        Part("step split", f"{_HERE}.step", 60, 15),
        *of_flavours("decoder engines", "decoder_engines", 150, 40),
        Part("encoders", f"{_HERE}.encoders", 90, 15),
        *of_flavours("engines", "engines", 90, 30),
        Part("serving loop", f"{_HERE}.step", 40, 15, "in_process"),
        *of_flavours("served", "served", 120, 40),
        Part("several GPUs", f"{_HERE}.ranks", 40, 15),
        Part("ranks", f"{_HERE}.ranks", 120, 40, "generate"),
        Part("encoders, ONNX Runtime", f"{_HERE}.encoders", 60, 20, "measure_onnxruntime"),
        Part("decoders, vLLM", f"{_HERE}.peers", 180, 90),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu-proof", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--dry", action="store_true", help="on this CPU, with tiny shapes: proves that the script works"
    )
    parser.add_argument("--out", type=Path, help="the result is a new folder in it (docs/gpu; dry: a temporary one)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all sections together")
    parser.add_argument("--json", action="store_true", help="print proof.json instead of the page")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as scratch:
        chosen = setting.dry(Path(scratch)) if options.dry else setting.on_gpu(require_gpu(), Path(scratch))
        device = _device(chosen)
        folder = new_folder(options.out or default_out(chosen), "dry-run" if chosen.dry else device)
        sections: list[Section] = []

        def report(section: Section) -> None:
            sections.append(section)
            _tell(section)

        try:
            run_parts(parts(), chosen, options.budget_s, report)
        finally:  # what was measured until a signal came is written, too
            proof = Proof(_today(), device, chosen.dry, options.budget_s, tuple(sections))
            if sections:
                write(proof, folder)
    illustrate(proof, folder)
    print(proof.to_json() if options.json else page.render(proof, ()), end="")
    if proof.failed:
        raise CheckError("; ".join(f"section {each.name} failed: {each.reason}" for each in proof.failed))


def require_gpu() -> str:
    """SM of the first GPU. Raises MachineError without one."""
    targets = visible_targets()
    if not targets:
        raise MachineError(
            "GPU of this machine",
            got="none: nvidia-smi is not there, or names no GPU",
            expected="an NVIDIA GPU and its driver",
            fix="run it on a machine with a GPU (make gpu-bundle makes a folder to carry there), or make gpu-proof-dry",
        )
    return targets[0]


def default_out(chosen: Setting) -> Path:
    return Path(tempfile.mkdtemp(prefix="gpu-proof-dry-")) if chosen.dry else Path("docs/gpu")


def new_folder(out: Path, device: str) -> Path:
    """`<out>/<device>-<date>`. Raises InputError where there is one of today: a result is never written over."""
    folder = out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{_today()}"
    if folder.exists():
        raise InputError(
            f"result {folder}", got="a folder that is there already", expected="none of this name",
            fix="move it away, or give another --out",
        )  # fmt: skip
    return folder


def write(proof: Proof, folder: Path) -> None:
    """JSON and page, all or nothing."""
    with atomic_directory(folder) as work:
        (work / "proof.json").write_text(proof.to_json())
        (work / "README.md").write_text(page.render(proof, ()))
    print(f"written to {folder}", file=sys.stderr)


def illustrate(proof: Proof, folder: Path) -> None:
    """Plots for a page that is written. Where they cannot be drawn, the page says why, and nothing else is lost."""
    try:
        from measure.gpu_proof.plots import draw

        plots, note = draw(proof), ""
        for name, svg in plots.items():
            (folder / f"{name}.svg").write_text(svg)
    except Exception as error:  # noqa: BLE001 - the figures took minutes of a GPU, a drawing is made again from them
        plots, note = {}, f"No plots: {type(error).__name__}: {error}"
        print(note, file=sys.stderr)
    page_file = folder / ".README.md"
    page_file.write_text(page.render(proof, tuple(plots), note))
    page_file.rename(folder / "README.md")


def _device(chosen: Setting) -> str:
    return processor_name() if chosen.dry else gpu_facts()[0]["name"]


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _tell(section: Section) -> None:
    print(f"{section.seconds:6.1f} s  {section.name}: {section.status} {section.reason}".rstrip(), file=sys.stderr)


def _exit(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # what this one makes us write is not cut short by a second
    sys.exit(128 + number)


def run(command: Callable[[], object]) -> None:
    """Errors to exit codes as the CLI has them, without the packages that the CLI needs."""
    signal.signal(signal.SIGTERM, _exit)
    try:
        command()
    except TriremeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    run(main)
