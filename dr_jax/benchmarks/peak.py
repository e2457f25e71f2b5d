"""Published peaks of accelerators, of which a step reaches a fraction.

Dense matrix products, as the makers state them; figures "with sparsity" are
halved. float32 is what XLA does with it by default: TensorFloat-32 on NVIDIA
GPUs that have it, bfloat16 products on TPUs.
"""

from __future__ import annotations

import re

# TFLOP/s in bfloat16 and in float32, None where there is no such unit.
# NVIDIA's data sheets of the A100, H100, H200, L4 and T4;
# cloud.google.com/tpu/docs/system-architecture-tpu-vm for TPUs, per chip.
_PEAKS: tuple[tuple[str, float | None, float], ...] = (
  (r"NVIDIA A100\b", 312, 156),
  (r"NVIDIA H100 PCIe\b", 756, 378),
  (r"NVIDIA H[12]00 NVL\b", 835, 418),
  (r"NVIDIA (H100|H200|GH200)\b", 989, 495),
  (r"NVIDIA L4\b", 121, 60),
  # Turing multiplies float16 in its tensor cores, but not bfloat16.
  (r"(Tesla|NVIDIA) T4\b", None, 8.1),
  (r"TPU v4$", 275, 275),
  (r"TPU v5( lite|e)$", 197, 197),
  (r"TPU v5p?$", 459, 459),
  (r"TPU v6( lite|e)$", 918, 918),
)


def peak(kind: str, dtype: str) -> float | None:
  """Returns the peak of one device in FLOP/s, or None if it is not known.

  Args:
    kind: `jax.Device.device_kind`.
    dtype: "bfloat16" or "float32", the type of computation.
  """
  if " MIG " in kind:  # A part of a GPU.
    return None
  for pattern, bfloat16, float32 in _PEAKS:
    if re.match(pattern, kind):
      found = bfloat16 if dtype == "bfloat16" else float32
      return None if found is None else found * 1e12
  return None


def fraction_of_peak(
  macs: int, images_per_second: float, passes: int, peak: float
) -> float:
  """Returns the fraction of a peak, counting the model's own products only.

  Args:
    macs: multiply-accumulates of one image's forward pass.
    images_per_second: that whole steps train on.
    passes: passes of a step, one per bit-width. Each takes a forward pass and a
      backward pass of twice its cost, two operations for a
      multiply-accumulate.
    peak: FLOP/s of all devices together.
  """
  return 2 * 3 * macs * passes * images_per_second / peak
