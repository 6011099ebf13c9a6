"""Peaks of accelerators, from the vendors' data sheets. `cost.parts` measures the speed of this machine."""

from typing import NamedTuple

from ufbert.errors import UserError, near_miss


class DevicePeaks(NamedTuple):
    """The limits of an accelerator, for dense arithmetic (data sheets also print twice as much, for sparse matrices)."""

    name: str
    """Its name on the command line."""
    kinds: tuple[str, ...]
    """Prefixes of jax's `device_kind` for it."""
    platform: str
    """gpu or tpu."""
    bfloat16: float
    """FLOP/s of bfloat16 matrix products with float32 sums; 0 if the device has no such units."""
    float32: float
    """FLOP/s of true float32 products, not TF32."""
    bandwidth: float
    """Bytes/s of the device's memory."""
    memory: float
    """Bytes of the device's memory."""
    source: str
    """The document that prints the numbers, and assumptions."""

    def products(self, dtype: str) -> float:
        """Return the FLOP/s of matrix products of `dtype`."""
        return self.bfloat16 if dtype == "bfloat16" and self.bfloat16 else self.float32

    @property
    def dtype(self) -> str:
        """The type that a model should compute in on this device."""
        return "bfloat16" if self.bfloat16 else "float32"


DEVICES = (
    DevicePeaks(
        "h100", ("NVIDIA H100 80GB HBM3",), "gpu", 989.4e12, 66.9e12, 3.35e12, 80e9, "NVIDIA H100 data sheet, SXM5"
    ),
    DevicePeaks("h100-pcie", ("NVIDIA H100 PCIe",), "gpu", 756e12, 51.2e12, 2.0e12, 80e9, "NVIDIA H100 data sheet, PCIe"),
    DevicePeaks("h200", ("NVIDIA H200",), "gpu", 989.4e12, 66.9e12, 4.8e12, 141e9, "NVIDIA H200 data sheet, SXM"),
    DevicePeaks(
        "a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"), "gpu", 312e12, 19.5e12, 2.039e12, 80e9,
        "NVIDIA A100 data sheet, SXM 80 GB",
    ),
    DevicePeaks(
        "a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), "gpu", 312e12, 19.5e12, 1.555e12, 40e9,
        "NVIDIA A100 data sheet, 40 GB",
    ),
    DevicePeaks(
        "rtx4090", ("NVIDIA GeForce RTX 4090",), "gpu", 165.2e12, 82.6e12, 1.008e12, 24e9,
        "NVIDIA Ada GPU architecture white paper",
    ),
    DevicePeaks(
        "a6000", ("NVIDIA RTX A6000",), "gpu", 154.8e12, 38.7e12, 768e9, 48e9,
        "NVIDIA RTX A6000 data sheet and GA102 white paper",
    ),
    DevicePeaks(
        "2080ti", ("NVIDIA GeForce RTX 2080 Ti",), "gpu", 0.0, 13.4e12, 616e9, 11e9,
        "NVIDIA Turing architecture white paper; Turing multiplies float16 in its tensor cores but not bfloat16, and this "
        "package has no float16, so float32 is assumed",
    ),
    DevicePeaks(
        "tpu-v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 197e12, 197e12 / 6, 819e9, 16e9,
        "Google Cloud TPU v5e documentation; a true float32 product is six bfloat16 ones there",
    ),
)  # fmt: skip


def device_names() -> list[str]:
    """Return every name that `find_device` knows."""
    return [device.name for device in DEVICES]


def find_device(name: str) -> DevicePeaks:
    """Return the device of a command-line name. Raises UserError, with the nearest name, if there is none."""
    for device in DEVICES:
        if device.name == name.lower():
            return device
    known = ["auto", "cpu", *device_names()]
    raise UserError(f"There is no device {name!r} in the table of peaks; {near_miss(name, known)}")


def device_of_kind(device_kind: str) -> DevicePeaks | None:
    """Return the device that jax calls `device_kind`, or None if it is not in the table."""
    return next((device for device in DEVICES if device_kind.startswith(device.kinds)), None)
