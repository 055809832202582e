"""The GPU proof without a GPU: its arithmetic, how sections end, the page, and the whole script once on the CPU."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.errors import CheckError, InputError, MachineError
from measure.gpu_proof import __main__ as proof_command
from measure.gpu_proof import page, sections, setting
from measure.gpu_proof.decoder_engines import whole_seconds
from measure.gpu_proof.record import Measured, Proof, Section
from measure.gpu_proof.roofline import (
    DeviceLimits,
    LeastWork,
    against,
    decode_work,
    encoder_work,
    prefill_work,
)
from measure.gpu_proof.sections import Part, run_parts
from measure.gpu_proof.setting import BERT_BASE, LLAMA_8B
from measure.gpu_proof.timing import NotRun, in_time
from runtime.gpu import visible_targets
from tests import ROOT
from tests.conftest import wait_until

LIMITS = DeviceLimits(bytes_per_s=4e12, flops_per_s=8e14)
no_gpu = pytest.mark.skipif(bool(visible_targets()), reason="this machine has a GPU")


def test_a_large_decoder_is_counted_as_by_hand() -> None:
    """Llama-3-8B: 7.504e9 parameters without the table of words; 128 KiB of cache a token in fp16."""
    one, more = (decode_work(LLAMA_8B, 1, context, 2) for context in (512, 4096))
    assert one.bytes - 512 * 131072 == pytest.approx(2 * 7.504e9, rel=1e-3)
    assert more.bytes - one.bytes == (4096 - 512) * 131072
    assert one.flops == pytest.approx(2 * 7.504e9 + 4 * 512 * 4096 * 32, rel=1e-3)
    eight = decode_work(LLAMA_8B, 8, 512, 2)
    assert eight.flops == pytest.approx(8 * one.flops)
    assert eight.bytes - one.bytes == pytest.approx(7 * 512 * 131072)
    assert prefill_work(LLAMA_8B, 512, 2).flops == pytest.approx(2 * 512 * 6.979e9 + 1.05e9 + 7e10, rel=2e-2)
    assert encoder_work(BERT_BASE, 1, 128, 2).flops == pytest.approx(2.235e10, rel=1e-2)


def test_the_floor_is_the_longer_of_both_times() -> None:
    for work, bound in ((LeastWork(4e9, 8e10), "memory"), (LeastWork(4e6, 8e11), "arithmetic")):
        row = against(Measured("case", "way"), work, 2e-3, LIMITS)
        assert (row.figures["floor_ms"], row.facts) == (pytest.approx(1.0), {"bound by": bound})
    row = against(Measured("case", "way"), LeastWork(bytes=4e9, flops=1.0), 4e-3, LIMITS, tokens_per_s=250.0)
    assert row.figures["fraction"] == pytest.approx(0.25)
    assert row.figures["tokens_per_s"] == 250.0
    assert row.facts == {"bound by": "memory"}
    assert set(against(Measured("case", "way"), LeastWork(1.0, 1.0), 1.0, None).figures) == {"ms", "gb", "gflop"}


@given(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2), st.integers(1, 4), st.integers(1, 4), st.integers(8, 80))
def test_a_whole_model_follows_from_two_depths(shared: float, block: float, few: int, more: int, layers: int) -> None:
    depths = (few, few + more)
    first, second = (shared + depth * block for depth in depths)
    assert whole_seconds(first, second, depths, layers) == pytest.approx(shared + layers * block)


@pytest.fixture
def tiny(tmp_path: Path) -> setting.Setting:
    return setting.dry(tmp_path)


def _part(function: str, **changes: float) -> Part:
    return Part(function, f"tests.measure.gpu_proof_parts:{function}", **{"most_s": 60.0, **changes})  # type: ignore[arg-type]


def test_sections_end_each_in_its_way_and_the_next_goes_on(
    tiny: setting.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "GRACE_S", 0.0)
    parts = [replace(_part("sound"), name="limits"), *map(_part, ("raising", "lacking", "without_package", "dying")),
             _part("hanging", most_s=5.0), _part("sound")]  # fmt: skip
    found = {section.name: section for section in run_parts(parts, tiny, 300)}
    assert list(found) == ["limits", "raising", "lacking", "without_package", "dying", "hanging", "sound"]
    assert {name: section.status for name, section in found.items()} == {
        "limits": "ran", "raising": "failed", "lacking": "not run", "without_package": "not run", "dying": "failed",
        "hanging": "failed", "sound": "ran",
    }  # fmt: skip
    assert found["raising"].reason == "RuntimeError: the third kernel is broken"
    assert len(found["raising"].rows) == len(found["dying"].rows) == 1  # what was measured before is kept
    assert found["lacking"].reason == "no such GPU"
    assert found["without_package"].reason == "no module a_package_that_nobody_has"
    assert found["dying"].reason == "its process ended with exit code -11"
    assert "did not end in its time" in found["hanging"].reason
    assert not Path("/proc", str(int(found["hanging"].rows[0].figures["pid"]))).exists()
    assert found["sound"].rows[1].figures == {"bytes_per_s": 100e9}  # the limits that the first section measured


def test_whoever_started_it_may_have_blocked_its_signals(tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})\n"
        "from pathlib import Path; from measure.gpu_proof import sections, setting\n"
        "part = sections.Part('sound', 'tests.measure.gpu_proof_parts:sound', most_s=60.0)\n"
        "print([found.status for found in sections.run_parts([part], setting.dry(Path(sys.argv[1])), 300)])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "['ran']\n"), done.stderr


def test_a_section_that_does_not_fit_the_budget_is_not_begun(tiny: setting.Setting) -> None:
    [section] = run_parts([_part("sound", least_s=20.0)], tiny, 10)
    assert section.status == "not run"
    assert section.reason.startswith("time: ")
    assert not section.rows


_INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from measure.gpu_proof import sections, setting
from tests.measure.gpu_proof_parts import ROW
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script in the background ignores it
parts = [
    sections.Part(name, f"tests.measure.gpu_proof_parts:{name}", most_s=60.0, arguments=arguments)
    for name, arguments in (("interrupting", (str(os.getpid()),)), ("sound", ()))
]
found = sections.run_parts(parts, setting.dry(Path(sys.argv[1])), 300)
ended = next(found)
print(ended.name, ended.status, ended.reason == sections.ENDED, ended.rows[0] == ROW)
try:
    next(found)
except KeyboardInterrupt:
    print("raised")
"""


def test_a_signal_keeps_what_the_section_under_way_has_measured(tmp_path: Path) -> None:
    """In a process of its own: a signal that goes astray ends that, and no other tests."""
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.stdout.splitlines() == ["interrupting not run True True", "raised"], done.stderr


def _proof(*sections: Section) -> Proof:
    return Proof("2026-11-22", "a GPU", False, 450.0, sections)


def _saved(folder: Path) -> Proof:
    data = json.loads((folder / "proof.json").read_text())
    sections = (
        Section(**{**each, "rows": tuple(Measured(**row) for row in each["rows"])}) for each in data["sections"]
    )
    return Proof(**{**data, "sections": tuple(sections)})


def _case(how: str, fraction: float, case: str = "decode") -> Measured:
    figures = {"ms": 1 / fraction, "floor_ms": 1.0, "fraction": fraction, "tokens_per_s": 100 * fraction}
    return Measured(case, how, {"batch": 1, "context": 512}, figures, {"bound by": "memory"})


def test_the_largest_gap_is_that_of_the_fastest_way() -> None:
    rows = (_case("eager", 0.1), _case("graph", 0.8), _case("eager", 0.5, "prompt"))
    gap = _proof(Section("decoders", "ran", "", 1.0, rows)).largest_gap
    assert gap is not None
    assert (gap.case, gap.how, gap.figures["fraction"]) == ("prompt", "eager", 0.5)
    assert _proof(Section("machine", "ran")).largest_gap is None


def test_a_way_that_beats_its_floor_hides_no_gap_and_is_named() -> None:
    rows = (_case("INT8 engine", 1.25), _case("graph", 0.3), _case("eager", 0.5, "prompt"), _case("L2", 2.0, "tiny"))
    proof = _proof(Section("engines", "ran", "", 1.0, rows))
    gap = proof.largest_gap
    assert gap is not None
    assert (gap.case, gap.how) == ("decode", "graph")
    text = page.render(proof)
    assert "decode, INT8 engine: 125.0%; tiny, L2: 200.0%." in text
    assert _proof(Section("engines", "ran", "", 1.0, rows[:1])).largest_gap is None


def test_the_page_says_what_ran_what_did_not_and_why() -> None:
    rows = (
        _case("graph", 0.5),
        Measured("decode, batch 128", "graph", reason="a cache of 69 GB does not fit"),
        Measured("GPU 0", "driver", facts={"name": "a GPU", "driver_version": "1|2"}),
    )
    proof = _proof(
        Section("decoders", "ran", "", 12.0, rows), Section("vLLM", "not run", "no module vllm", 0.1),
        Section("served", "failed", "ServerFault: it broke", 3.0),
    )  # fmt: skip
    text = page.render(proof, ("fraction",))
    assert "| decode | graph | 2 | 1 | 50.0% | 50 | memory |" in text
    assert "- decode, batch 128 (graph): not run: a cache of 69 GB does not fit" in text
    assert "- GPU 0: name a GPU, driver_version 1|2" in text
    assert "| served | failed | 3 | ServerFault: it broke |" in text
    assert (
        "decode: graph, the fastest way that the limit holds for, takes 2 ms where memory alone takes 1 ms: 50.0%"
        in text
    )
    assert "![Achieved fraction of the limit](fraction.svg)" in text
    assert "Faster than the limit" not in text
    assert page.DRY_NOTICE not in text
    assert page.DRY_NOTICE in page.render(replace(proof, dry=True))


@no_gpu
def test_without_a_gpu_it_says_what_to_do_and_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "measure.gpu_proof", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == MachineError.exit_code == 2
    assert "got none" in done.stderr
    assert "Fix: run it on a machine with a GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_starts_where_few_packages_are(tmp_path: Path) -> None:
    """A machine for GPU work has torch and numpy; what else is absent costs the sections that need it."""
    absent = ("pydantic", "typer", "rich", "polygraphy", "tritonclient", "tensorrt_rtx", "yaml", "matplotlib")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import runpy; "
        "sys.argv = ['gpu-proof', '--help']; runpy.run_module('measure.gpu_proof', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--budget-s" in done.stdout


def test_a_result_is_never_written_over(tmp_path: Path) -> None:
    folder = proof_command.new_folder(tmp_path, "NVIDIA H200 (SXM)")
    assert folder.name.startswith("nvidia-h200-sxm-20")
    folder.mkdir()
    with pytest.raises(InputError, match="Fix: move it away"):
        proof_command.new_folder(tmp_path, "NVIDIA H200 (SXM)")


def test_a_drawing_that_fails_costs_the_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = _proof(Section("decoders", "ran", "", 1.0, (_case("graph", 0.5),)))
    folder = tmp_path / "result"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    proof_command.write(proof, folder)
    assert _saved(folder) == proof
    assert "No plots: ModuleNotFoundError" in (folder / "README.md").read_text()
    assert {file.name for file in folder.iterdir()} == {"proof.json", "README.md"}


def test_a_failed_section_fails_the_command_and_the_result_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof_command, "parts", lambda **_: (_part("raising"), _part("sound")))
    with pytest.raises(CheckError, match=r"section raising failed: RuntimeError") as raised:
        proof_command.main(["--dry", "--out", str(tmp_path)])
    assert raised.value.exit_code == 1
    (folder,) = tmp_path.iterdir()
    saved = _saved(folder)
    assert [section.status for section in saved.sections] == ["failed", "ran"]


def test_sigterm_ends_the_command_and_everything_it_started_and_keeps_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "measure.gpu_proof", "--dry", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr is not None
        assert "machine: ran" in process.stderr.readline()
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert wait_until(lambda: not _group_lives(process.pid), limit_s=30)
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    (folder,) = (tmp_path / "out").iterdir()
    first, *others = _saved(folder).sections
    assert (first.name, first.status) == ("machine", "ran")
    assert first.rows
    assert [first.name, *(section.name for section in others)] == [part.name for part in proof_command.parts()]
    assert others[-1].reason == "the proof was ended before it was done"
    assert (folder / "README.md").is_file()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "measure.gpu_proof", "--dry", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.iterdir()
    assert {file.name for file in folder.iterdir()} == {"proof.json", "README.md", "fraction.svg", "tokens.svg"}
    proof = _saved(folder)
    assert json.loads(done.stdout) == json.loads((folder / "proof.json").read_text())
    assert proof.dry
    assert page.DRY_NOTICE in (folder / "README.md").read_text()
    found = {section.name: section for section in proof.sections}
    assert list(found) == [part.name for part in proof_command.parts()]
    absent = {name: section.reason for name, section in found.items() if section.status == "not run"}
    lacking = {name for name in found if name.endswith(", tensorrt")}  # a package that CI lacks
    assert set(absent) <= lacking, absent
    built = [row for name in found for row in found[name].rows if "built ahead of time" in row.note]
    assert {row.case for row in built if row.figures["mb"] > 0} >= {"tiny BERT, engine"}
    assert all("not run: no GPU here" in row.note for row in built)
    ways = {row.how for row in found["decoders"].rows}
    assert ways == {"torch eager", "torch.compile"}
    gap = proof.largest_gap
    assert gap is not None
    assert gap.figures["fraction"] > 0


def test_every_part_is_there() -> None:
    """They are named, for they are imported in their own processes: a name that is wrong would show on a GPU only."""
    assert all(callable(pkgutil.resolve_name(part.function)) for part in proof_command.parts())


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


def test_a_case_that_is_not_measured_says_why_and_the_next_goes_on(tiny: setting.Setting) -> None:
    def refused(row: Measured) -> list[Measured]:
        raise NotRun("its cache does not fit")

    def too_large(row: Measured) -> list[Measured]:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 69.00 GiB. GPU 0 has")

    def broken(row: Measured) -> Iterator[Measured]:
        yield row  # what it has measured is kept
        raise RuntimeError("the third kernel is broken")

    row, done = Measured("case", "way"), Measured("case", "way", figures={"ms": 1.0})
    cases = [(row, refused), (row, lambda _: [done])]
    assert list(in_time(tiny, cases)) == [replace(row, reason="its cache does not fit"), done]
    [large] = in_time(tiny, [(row, too_large)])
    assert large.reason == "does not fit the memory: CUDA out of memory"
    with pytest.raises(RuntimeError, match="third kernel"):
        list(in_time(tiny, [(row, broken)]))
    no_time = replace(tiny, device="cuda", deadline=0.0)
    assert list(in_time(no_time, cases[1:], least_s=10.0)) == [replace(row, reason="time")]
