"""Strict numerics for every test: no implicit dtype or rank promotion."""

import collections
import functools
import gc
import json
import os
import pathlib
import signal

# Four CPU devices, before jax starts: sharding tests need a mesh. NPROC is the
# size of XLA:CPU's thread pool; with as many threads as devices, collectives
# can wait for a thread that never comes free, and XLA ends the process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import numpy as np
import optax
import pytest
import quick_compilation
from absl import flags

from dr_jax.runtime import compilation

# A process of tests imports several commands, of which each has flags of its
# own, under the same names.
flags.Flag.__init__ = functools.partialmethod(
  flags.Flag.__init__, allow_override=True
)

# In fixtures of every scope, too.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """One cache of compiled programs for all workers and child processes.

  Each run begins with an empty one, unless JAX_COMPILATION_CACHE_DIR names one.
  It has all programs: of the 350 of a short job all but 30 compile in less than
  0.1 s, but take half of its time together.
  """
  if jax.config.jax_compilation_cache_dir is None:
    run = tmp_path_factory.getbasetemp()
    # Under xdist every worker has its own directory below that of the run.
    run = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    # Where the commands of users have it.
    os.environ["XDG_CACHE_HOME"] = str(run / "cache")
    compilation.cache_on_disk()
  else:
    name = "jax_persistent_cache_min_compile_time_secs"
    os.environ.setdefault(name.upper(), "0")
    jax.config.update(name, float(os.environ[name.upper()]))


# Compilation takes most of both runs, in which XLA optimizes little, but in
# these files: laws of methods and exported programs hold bit for bit in
# programs of users, trained networks predict the same there, and a step takes
# the memory that is estimated, and reaches the numbers of one that compiles
# quickly. Where a test trains for many seconds, running takes longer instead.
OPTIMIZED = (
  "quant/core/rows_test.py",
  "quant/laws_test.py",
  "deploy/export/stablehlo_test.py",
  "deploy/trained_networks_test.py",
  "train/divergence_test.py",
  "train/optimized_step_test.py",
  "train/residuals_test.py",
)


# Where this run is a job in the background, which ignores Ctrl-C, the processes
# that tests start and interrupt must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure():
  """Also collects garbage less often: over what JAX keeps, it takes a tenth."""
  gc.set_threshold(50_000)
  quick_compilation.use(True)


def pytest_ignore_collect(collection_path, config):
  """The slow run does not import files that mark nothing as slow."""
  if config.option.markexpr == "slow" and collection_path.suffix == ".py":
    return "slow" not in collection_path.read_text() or None


@pytest.fixture(scope="module", autouse=True)
def kept_by_earlier_files():
  """Leaves out of collections of garbage what files before this one keep.

  Some tests, and the library where Orbax or a worker fails, collect all; with
  what JAX keeps of hundreds of tests, that takes more than a second each time.
  """
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def options_of_xla():
  with pytest.MonkeyPatch.context() as patch:
    quick_compilation.install(patch)
    yield


@pytest.fixture(scope="module", autouse=True)
def optimization(request):
  file = request.path.relative_to(pathlib.Path(__file__).parent).as_posix()
  quick_compilation.use(file not in OPTIMIZED)
  yield
  quick_compilation.use(True)


@pytest.fixture(scope="session", autouse=True)
def optax_promotes():
  """Optax counts steps in integers and mixes them with floats; no other may."""

  def promoting(function):
    def wrapped(*args, **kwargs):
      with jax.numpy_dtype_promotion("standard"):
        return function(*args, **kwargs)

    return wrapped

  def optimizer(make):
    def made(*args, **kwargs):
      init, update = make(*args, **kwargs)
      return optax.GradientTransformation(init, promoting(update))

    return made

  def schedule(make):
    return lambda *args, **kwargs: promoting(make(*args, **kwargs))

  with pytest.MonkeyPatch.context() as patch:
    for name in ("adam", "scale_by_adam"):
      patch.setattr(optax, name, optimizer(getattr(optax, name)))
    name = "cosine_decay_schedule"
    patch.setattr(optax, name, schedule(getattr(optax, name)))
    yield


@pytest.fixture
def golden():
  """Loads a reference file (npz or JSON) by name; skips where it is absent."""
  beside = pathlib.Path(__file__).parents[2] / "shared" / "golden"
  folder = pathlib.Path(os.environ.get("DR_JAX_GOLDEN", beside))

  def load(name):
    if not (folder / name).is_file():
      pytest.skip(f"no {name} in {folder}: set DR_JAX_GOLDEN to its folder")
    if name.endswith(".json"):
      return json.loads((folder / name).read_text(encoding="utf-8"))
    return np.load(folder / name)

  return load


@pytest.fixture
def compiled():
  """Counts the programs that are compiled, or read from the disk, by name."""
  counts = collections.Counter()

  def count(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration":
      counts[about["fun_name"]] += 1

  jax.monitoring.register_event_duration_secs_listener(count)
  yield counts
  jax.monitoring.unregister_event_duration_listener(count)
