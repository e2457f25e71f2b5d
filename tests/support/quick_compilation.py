"""Programs that are lowered and compiled in less time.

XLA:CPU takes a third of the time with some options. To make a context of MLIR
takes half of the time in which JAX lowers a small program: many share one.
"""

import contextlib
import itertools
import os

import jax

# Little optimization, which is an option of JAX. Without the emitters of
# fusions, which take longer than LLVM; in one module for LLVM instead of 32.
_QUICK = {
  "xla_cpu_use_fusion_emitters": False,
  "xla_cpu_parallel_codegen_split_count": 1,
}
# What JAX's option comes to, for single programs.
_LITTLE = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
_state = {"quick": False, "known": False}


def use(quick):
  """Whether what is compiled from now on is compiled quickly.

  What was compiled in the other way is forgotten: results of both can differ in
  their last bits.
  """
  if quick != _state["quick"]:
    jax.clear_caches()
  jax.config.update("jax_disable_most_optimizations", quick)
  _state["quick"] = quick


@contextlib.contextmanager
def used():
  """Programs of these lines are compiled quickly, whatever others are."""
  before = _state["quick"]
  use(True)
  try:
    yield
  finally:
    use(before)


def jit(function):
  """`jax.jit` of a program that compiles quickly, whatever others do."""
  options = _QUICK | _LITTLE if _state["known"] else None
  return jax.jit(function, compiler_options=options)


def install(monkeypatch):
  """Has JAX share contexts, and take the options of XLA while `use` says so."""
  _share_contexts(monkeypatch)
  _take_options(monkeypatch)


def _share_contexts(monkeypatch, modules=50):
  """Has so many modules in a row share a context; constants stay in it."""
  try:
    from jax._src.interpreters import mlir

    make = mlir.make_ir_context
  except (ImportError, AttributeError):
    return
  number, shared = itertools.count(), {}

  def context():
    index = next(number) // modules
    found = shared.get(index)
    if found is None:
      shared.clear()
      found = shared[index] = make()
    return found

  monkeypatch.setattr(mlir, "make_ir_context", context)


def _take_options(monkeypatch):
  """Has JAX take the options of XLA, if both still know them.

  JAX has options of XLA for single functions or for the process, where an
  unknown one ends it.
  """
  try:
    options = _QUICK | _LITTLE
    jax.jit(lambda: 0, compiler_options=options).lower().compile()
    from jax._src import compiler

    make = compiler.get_compile_options
  except (jax.errors.JaxRuntimeError, ImportError, AttributeError):
    return

  def made(*args, env_options_overrides=None, **kwargs):
    options = _QUICK if _state["quick"] else {}
    options = options | (env_options_overrides or {})
    return make(*args, env_options_overrides=options, **kwargs)

  monkeypatch.setattr(compiler, "get_compile_options", made)
  _state["known"] = True


def environment(*flags):
  """Variables for a child process that compiles quickly, with flags of XLA."""
  options = _QUICK if _state["known"] else {}
  flags += tuple(f"--{name}={str(x).lower()}" for name, x in options.items())
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "XLA_FLAGS": " ".join(flags),
  }
