"""`jit` with the compiler options that training needs on each backend.

XLA:CPU of jaxlib 0.10 hands float convolutions to YNNPACK, whose kernel
gradients took 1.3 times (AVX-512) to 3 to 7 times (AVX2) as long as XLA's own;
`python -m dr_jax.benchmarks.convolution` measures it. Training programs leave
it out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


def jit(function: Callable[..., Any], **options: Any) -> jax.stages.Wrapped:
  """`jax.jit` with this backend's compiler options; for outermost jits only."""
  return jax.jit(function, compiler_options=compiler_options(), **options)


@functools.cache
def compiler_options() -> dict[str, str] | None:
  """Options for this backend, or None; also if this XLA does not know them."""
  if jax.default_backend() != "cpu":
    return None
  try:
    jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
  except Exception:  # An experimental option: XLA may drop or rename it.
    return None
  return _CPU


def cache_on_disk() -> None:
  """Keeps compiled programs between processes, unless JAX is configured to.

  All of them: by default JAX keeps what took a second to compile, but a run
  consists of some 300 programs that took less, and two thirds of its start.
  They are in $XDG_CACHE_HOME, else ~/.cache; nowhere for a user without a home.
  """
  # JAX defines its options when it is imported.
  if jax.config.jax_compilation_cache_dir is None:  # pyrefly: ignore
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # As the XDG specification has it: what is not absolute does not count.
    places = (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache")
    for place in map(os.path.expanduser, places):
      if os.path.isabs(place):
        directory = os.path.join(place, "dr_jax", "jax")
        jax.config.update("jax_compilation_cache_dir", directory)
        return
