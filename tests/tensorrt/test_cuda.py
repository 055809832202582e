"""The CUDA wrapper through its real ctypes signatures, on a stand-in for the library."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import BadEnvironment, ServerFault
from runtime.gpu import visible_targets
from runtime.tensorrt.cuda import Box, Copy3D, Cuda, load_shared, pin_device
from tests.tensorrt.cuda_stand_in import StandIn

SIZES = st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(st.data(), SIZES, SIZES, SIZES, st.integers(1, 6))
def test_boxes_are_slices_of_arrays(data: st.DataObject, slices: int, rows: int, lines: int, positions: int) -> None:
    """A row of all caches: [slices, rows, lines, positions] with positions of 4 bytes."""
    standing = StandIn()
    cuda = Cuda(standing.library)
    shape = (slices, rows, lines, positions)
    size = int(np.prod(shape)) * 4
    source, target = cuda.device(size), cuda.device(size)
    cuda.wait()
    values = standing.array(source, shape, np.int32)
    values[:] = np.arange(values.size).reshape(shape) + 1
    origin, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, rows - 1))
    filled = data.draw(st.integers(0, positions))

    def box(base: int, row: int, begin: int = 0) -> Box:
        return Box(base + (row * lines * positions + begin) * 4, positions * 4, rows * lines, slices, lines)

    cuda.copy_box(box(target, place), box(source, origin), filled * 4)
    cuda.zero_box(box(source, place, filled), (positions - filled) * 4)
    expected, zeroed = np.zeros(shape, np.int32), values.copy()
    expected[:, place, :, :filled] = values[:, origin, :, :filled]
    zeroed[:, place, :, filled:] = 0
    cuda.wait()
    assert (standing.array(target, shape, np.int32) == expected).all()
    assert (values == zeroed).all()
    cuda.close()
    assert not standing.faults
    assert not standing.taken


def test_memory_comes_zeroed_and_goes() -> None:
    standing = StandIn()
    cuda = Cuda(standing.library)
    address, host = cuda.device(1000), cuda.pinned(1000)
    assert address % 256 == 0
    cuda.copy_out(host, address)
    cuda.wait()
    assert not host.any()
    assert standing.taken == 3  # the stream, too
    cuda.close()
    cuda.close()
    assert standing.taken == 0
    assert not standing.faults


def test_a_graph_repeats_its_work() -> None:
    standing = StandIn()
    cuda = Cuda(standing.library)
    address, host = cuda.device(4), cuda.pinned(4)
    host[:] = 7

    def work() -> bool:
        cuda.copy_in(address, host)
        return True

    graph = cuda.capture(work)
    assert graph is not None
    cuda.wait()
    assert not standing.array(address, (4,), np.uint8).any()  # captured, not run
    cuda.launch(graph)
    host[:] = 9  # before the copy is carried out, as late as it may be
    cuda.wait()
    assert (standing.array(address, (4,), np.uint8) == 9).all()
    cuda.drop(graph)
    assert standing.graphs == 0
    cuda.close()
    assert not standing.faults


@pytest.mark.parametrize("refusal", ["the library", "the library at once", "the work", "an error in the work"])
def test_a_refused_capture_leaves_the_stream_as_it_was(refusal: str) -> None:
    standing = StandIn()
    cuda = Cuda(standing.library)
    standing.refuses_capture = refusal == "the library"
    standing.fails = ("cudaStreamBeginCapture", 1) if refusal == "the library at once" else None

    def work() -> bool:
        if refusal == "an error in the work":
            raise ServerFault("no")
        return refusal.startswith("the library")

    if refusal == "an error in the work":
        with pytest.raises(ServerFault, match="no"):
            cuda.capture(work)
    else:
        assert cuda.capture(work) is None
    assert standing.graphs == 0
    cuda.wait()
    cuda.close()
    assert not standing.faults


def test_errors_name_the_call_and_tell_passing_from_lasting() -> None:
    standing = StandIn()
    cuda = Cuda(standing.library)
    standing.fails = ("cudaMalloc", 1)
    with pytest.raises(ServerFault, match=r"cudaMalloc failed: CUDA error 2, a fault"):
        cuda.device(8)
    assert cuda.usable()
    standing.broken = True
    with pytest.raises(ServerFault, match=r"cudaStreamSynchronize failed: CUDA error 700"):
        cuda.wait()
    assert not cuda.usable()
    cuda.close()  # as far as it goes, without an error of its own


def test_structures_have_the_sizes_of_cudas_header() -> None:
    assert ctypes.sizeof(Copy3D) == 8 + 24 + 32 + 8 + 24 + 32 + 24 + 8  # the kind is padded


NVIDIA_SMI = """\
#!/bin/sh
case "$1" in
  -L) echo "GPU 0: NVIDIA L4 (UUID: GPU-aaaa-1)"
      echo "GPU 1: NVIDIA A100 (UUID: GPU-bbbb-2)"
      echo "  MIG 1g.5gb     Device  0: (UUID: MIG-cccc-3)" ;;
  --query-gpu=index,uuid,compute_cap)
      printf '0, GPU-aaaa-1, 8.9\\n1, GPU-bbbb-2, 8.0\\n2, GPU-bbcc-4, 9.0\\n' ;;
  *) exit 2 ;;
esac
"""


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # so that what the code sets goes with the test
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("shown", "targets"),
    [
        (None, ["sm89", "sm80", "sm90"]),
        ("", []),
        ("2, 0", ["sm90", "sm89"]),
        ("GPU-bbcc-4,1", ["sm90", "sm80"]),
        ("GPU-aa,MIG-cccc-3", ["sm89", "sm80"]),
        ("1,-1,0", ["sm80"]),  # as in CUDA, nothing is seen behind one that is not there
        ("1,GPU-bb,0", ["sm80"]),  # of two GPUs
    ],
)
def test_a_process_sees_the_gpus_it_was_given(
    monkeypatch: pytest.MonkeyPatch, shown: str | None, targets: list[str]
) -> None:
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_targets() == targets
    for device, target in enumerate(targets):
        with monkeypatch.context() as undone:
            undone.setenv("CUDA_VISIBLE_DEVICES", shown or "")
            if shown is None:
                undone.delenv("CUDA_VISIBLE_DEVICES")
            pin_device(device)
            assert visible_targets() == [target]
            pin_device(0)  # once more changes nothing
            assert visible_targets() == [target]
            assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_gpu_that_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(
        BadEnvironment, match=r"GPU 2 of this process: CUDA_VISIBLE_DEVICES shows 2 \(2, 3\); name more"
    ):
        pin_device(2)


def test_no_driver_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_targets() == []


def test_a_library_that_is_not_there() -> None:
    with pytest.raises(BadEnvironment, match=r"none of libno-such\.so\.1 loads; install"):
        load_shared("libno-such.so.1")
