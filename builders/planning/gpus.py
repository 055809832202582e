"""GPU types that `plan` knows: peaks from the maker's documents.

Operations are dense FP16/BF16 on tensor cores; newer sheets print twice that, "with sparsity". Memory is in decimal
gigabytes as printed; a driver shows a little more. Links are one direction: half of what the sheets print.

The figures were checked against public texts that quote these documents; the documents themselves could not be opened
from where this was written. Two figures are contested there. A10G: NVIDIA's sheet for AWS says 70 (dense); 125 is
the A10's. B200: the sheet says up to 8 TB/s, drivers report a 7680-bit bus, which makes 7.7; the lower one is used.
"""

from __future__ import annotations

from typing import Literal

from runtime.record import Record

GIGA, TERA = 10**9, 10**12


class Gpu(Record):
    """Bytes, bytes per second and operations per second. `document` names the source, `source` is its address."""

    name: str
    memory_bytes: int
    bandwidth: int
    flops: int
    link_bandwidth: int
    link: Literal["nvlink", "pcie"]
    document: str
    source: str


_SHEETS = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center"
_A100 = (
    "NVIDIA A100 Tensor Core GPU datasheet (SXM)",
    f"{_SHEETS}/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
)
_A100_40 = (
    "NVIDIA A100 Tensor Core GPU Architecture whitepaper (SXM4)",
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
)
_A10G = (
    "NVIDIA A10G Tensor Core GPU datasheet for AWS",
    "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
)
_L4 = ("NVIDIA L4 Tensor Core GPU datasheet", "https://resources.nvidia.com/en-us-l4/l4-datasheet")
_H100 = (
    "NVIDIA H100 Tensor Core GPU datasheet (SXM)",
    "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
)
_H200 = ("NVIDIA H200 Tensor Core GPU datasheet (SXM)", "https://www.nvidia.com/en-us/data-center/h200/")
_B200 = (
    "NVIDIA Blackwell datasheet 3384703 (HGX B200)",
    "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet",
)


def _gpu(
    name: str,
    gigabytes: int,
    bandwidth_gb: int,
    tflops: int,
    link: Literal["nvlink", "pcie"],
    link_gb: int,
    origin: tuple[str, str],
) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=gigabytes * GIGA,
        bandwidth=bandwidth_gb * GIGA,
        flops=tflops * TERA,
        link_bandwidth=link_gb * GIGA,
        link=link,
        document=origin[0],
        source=origin[1],
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("L4", 24, 300, 121, "pcie", 32, _L4),
        _gpu("A10G", 24, 600, 70, "pcie", 32, _A10G),
        _gpu("A100-40", 40, 1555, 312, "nvlink", 300, _A100_40),
        _gpu("A100-80", 80, 2039, 312, "nvlink", 300, _A100),
        _gpu("H100", 80, 3350, 989, "nvlink", 450, _H100),
        _gpu("H200", 141, 4800, 989, "nvlink", 450, _H200),
        _gpu("B200", 180, 7700, 2250, "nvlink", 900, _B200),
    )
}
