"""Several processes on loopback, and the states that they leave.

As a program, `python tests/support/loopback.py OUT WORKDIR...` is one of
several processes that read the last state of each directory's stage pretrain
together.
It prints one JSON line for each, and writes the arrays of the first to OUT.
"""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import warnings

import jax
import numpy as np
import optax
import quick_compilation

from dr_jax import nn, train
from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.config import from_dict
from dr_jax.pipeline.context import RunContext
from dr_jax.runtime import processes, sharding

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def started(commands, *, devices=1):
  """One Python process for each command; killed at the end if still alive.

  Args:
    commands: arguments of Python, as lists of strings.
    devices: how many each process has.
  """
  together = {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    "JAX_NUM_PROCESSES": str(len(commands)),
  }
  running = []
  for number, command in enumerate(commands):
    environment = quick_compilation.environment(
      f"--xla_force_host_platform_device_count={devices}"
    ) | {
      "PYTHONPATH": str(ROOT),
      **(together if len(commands) > 1 else {}),
      "JAX_PROCESS_ID": str(number) if len(commands) > 1 else "",
    }
    running.append(
      subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.wait()
      process.stdout.close()


def finish(running, timeout=300):
  """The exit codes and what the processes said."""
  said = [process.communicate(timeout=timeout)[0] for process in running]
  return [process.returncode for process in running], said


def losses(workdir, stage):
  """The losses that a stage has logged."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return np.array(
    [x["value"] for x in lines if (x["stage"], x["name"]) == (stage, "loss")]
  )


def restored(workdir, **devices):
  """The last state of the stage pretrain, on a layout of these devices."""
  values = json.loads((workdir / "config.json").read_text())
  run = RunContext(
    from_dict({**values, "devices": devices}), workdir, lambda: None
  )
  recipe, network = run.config.pretrain, nn.functional(run.untrained())
  optimizer = train.make_optimizer(
    recipe.optimizer,
    param_labels=network.param_labels,
    weight_decay=recipe.weight_decay,
    momentum=recipe.momentum,
  )
  trainer = train.make_trainer(
    network, optimizer, optax.constant_schedule(0.0), layout=run.layout
  )
  state = trainer.init(jax.random.key(0))
  with Checkpoints(workdir / "pretrain" / "checkpoints") as checkpoints:
    return run.layout, checkpoints.restore(like=state)


def arrays(layout, state):
  """What training has changed, whole, by name."""
  changed = (state.params, state.opt_state, state.batch_stats)
  leaves = jax.tree.leaves_with_path(train.gather(layout, changed))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _held(leaf):
  """Which part of an array this process holds."""
  parts = {
    str(shard.index): shard.data.size for shard in leaf.addressable_shards
  }
  return sum(parts.values()) / leaf.size


def _main(out, *workdirs):
  processes.initialize()
  for number, workdir in enumerate(workdirs):
    for parameters in sharding.PARAMETERS:
      with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        layout, state = restored(pathlib.Path(workdir), parameters=parameters)
      leaves = jax.tree.leaves((state.params, state.opt_state))
      largest = max(leaves, key=lambda leaf: leaf.size)
      line = {
        "parameters": parameters,
        "step": int(state.step),
        "held": _held(largest),
        "warnings": [str(w.message) for w in warned],
      }
      print(json.dumps(line))
      if number == 0:
        name = f"{parameters}_{jax.process_index()}.npz"
        np.savez(pathlib.Path(out) / name, **arrays(layout, state))


if __name__ == "__main__":
  _main(*sys.argv[1:])
