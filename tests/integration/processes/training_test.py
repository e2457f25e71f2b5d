"""Training spread over processes: as by one, and what ends it."""

import functools
import json
import signal
import time

import jax
import loopback
import numpy as np
import pytest

from dr_jax import nn
from dr_jax.config import from_dict
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.multi_precision import multi_precision_network
from dr_jax.pipeline.stages.pretrain import float_network

finish, losses = loopback.finish, loopback.losses

STAGES = ("pretrain", "multi_precision")
FLAGS = (
  "--config=configs/digits.py",
  f"--config.stages={STAGES}",
  "--config.model.options.widths=(4, 4, 4)",
  "--config.pretrain.epochs=4",
  "--config.train.epochs=1",
  "--config.train.vectorize=sequential",
  "--config.checkpoint_every=6",
)
STEPS = 36  # 4 epochs of 1,257 images in batches of 128, and a part.


def started(count, workdir, *flags, last=()):
  """The processes of one run; `last` are flags of the last process alone."""
  command = ("-m", "dr_jax.main", *FLAGS, *flags, f"--workdir={workdir}")
  commands = [command] * (count - 1) + [(*command, *last)]
  return loopback.started(commands)


def trained(workdir):
  """The parameters of both stages, as the last checkpoints hold them."""
  values = json.loads((workdir / "config.json").read_text())
  run = RunContext(from_dict({**values, "devices": {"data": 1}}), workdir)
  networks = [float_network(run), multi_precision_network(run)]
  return [nn.functional(network).params for network in networks]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Uninterrupted runs, when asked for: number of processes -> workdir."""
  place = tmp_path_factory.mktemp("whole")

  @functools.cache
  def run(count):
    with started(count, place / str(count)) as running:
      codes, said = finish(running)
    assert codes == [0] * count, said
    assert sum("accuracy %" in text for text in said) == 1
    return place / str(count)

  return run


@pytest.mark.slow
def test_two_processes_train_to_the_parameters_of_one(whole):
  """Shards of a batch are summed in another order: float32, 36 steps."""
  alone, together = trained(whole(1))[0], trained(whole(2))[0]
  for a, b in zip(
    jax.tree.leaves(alone), jax.tree.leaves(together), strict=True
  ):
    np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-4)
  expected, found = (losses(whole(n), "pretrain") for n in (1, 2))
  assert len(expected) > 3
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  # A last bit can move a value to the next code: at 8, 6 and 4 bits that has
  # moved losses by up to 0.0006, at 2 bits by 0.023 of them.
  expected, found = (losses(whole(n), "multi_precision") for n in (1, 2))
  assert len(expected) == 4
  np.testing.assert_allclose(found[:3], expected[:3], rtol=3e-3)
  np.testing.assert_allclose(found[3], expected[3], rtol=5e-2)


def wait_for(path, running, timeout=120):
  deadline = time.monotonic() + timeout
  while not path.exists():
    assert time.monotonic() < deadline, f"no {path}"
    assert all(process.poll() is None for process in running)
    time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_others_end_with_a_message_and_a_restart_ends_the_same(
  whole, tmp_path, victim
):
  workdir = tmp_path / "run"
  with started(2, workdir) as running:
    wait_for(workdir / "pretrain" / "checkpoints" / "6", running)
    running[victim].kill()
    killed = time.monotonic()
    said, _ = running[1 - victim].communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert running[1 - victim].returncode not in (0, None)
    # Whichever notices first: a collective, or JAX's heartbeat to the first.
    messages = ("another process has ended", "another task died")
    assert any(message in said for message in messages)
    assert "Traceback" not in said
  assert not (workdir / "pretrain" / "result.json").exists()
  with started(2, workdir) as running:
    codes, said = finish(running)
  assert codes == [0, 0], said
  for a, b in zip(
    jax.tree.leaves(trained(whole(2))),
    jax.tree.leaves(trained(workdir)),
    strict=True,
  ):
    np.testing.assert_array_equal(b, a)


@pytest.mark.slow
def test_an_error_of_one_process_alone_ends_all(tmp_path):
  last = ("--config.seed=-1",)
  with started(2, tmp_path / "run", last=last) as running:
    codes, said = finish(running, timeout=90)
  assert codes[1] == 2
  assert "error: seed must be >= 0, got -1" in said[1]
  assert codes[0] not in (0, None)


@pytest.mark.slow
def test_an_error_of_the_first_process_reaches_all(tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "mine").write_text("")
  with started(2, tmp_path / "run") as running:
    codes, said = finish(running, timeout=90)
  assert codes == [2, 2]
  for text in said:
    assert "is not empty and holds no run" in text


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
  workdir = tmp_path / "run"
  with started(2, workdir, "--config.pretrain.epochs=400") as running:
    wait_for(workdir / "pretrain" / "checkpoints" / "6", running)
    running[1].send_signal(signal.SIGTERM)
    codes, said = finish(running, timeout=60)
  lines = [text.strip().splitlines()[-1] for text in said]
  assert lines[0] == lines[1]
  assert "pretrain: stopped by SIGTERM after step" in lines[0]
  assert codes == [0, 0]
