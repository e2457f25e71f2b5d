"""Parameters spread over real processes, and checkpoints that these share."""

import json
import shutil

import jax
import loopback
import numpy as np
import pytest

from dr_jax import pipeline
from dr_jax.config import from_dict

# Arrays of fewer than 4,096 elements are never spread; the largest has 9,216.
FLAGS = (
  *("-m", "dr_jax.main", "--config=configs/digits.py"),
  "--config.stages=('pretrain',)",
  "--config.model.options.widths=(8, 16, 32)",
  "--config.pretrain.epochs=2",
  "--config.checkpoint_every=10",
)
BEFORE, LAST = 10, 19  # Steps of the two checkpoints: 2 epochs of 9.8 batches.
DATA = "state/ocdbt.process_{}/d/*"


def trained(count, workdir):
  """What `count` processes said of a run that ended well."""
  command = (
    *FLAGS,
    "--config.devices.parameters=sharded",
    f"--workdir={workdir}",
  )
  with loopback.started([command] * count) as running:
    codes, said = loopback.finish(running, timeout=120)
  assert codes == [0] * count, said
  return said


# Several runs of several processes.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("together") / "run"
  trained(2, workdir)
  return workdir


@pytest.fixture(scope="module")
def alone(together, tmp_path_factory):
  """The same run in this process, on one device."""
  values = json.loads((together / "config.json").read_text())
  workdir = tmp_path_factory.mktemp("alone") / "run"
  pipeline.run(from_dict({**values, "devices": {"data": 1}}), workdir)
  return workdir


def final(workdir):
  """The last state as one process with one device reads it."""
  layout, state = loopback.restored(workdir, data=1)
  assert int(state.step) == LAST
  return loopback.arrays(layout, state)


def damaged(workdir, copy, pattern, damage):
  """A copy that ends before the stage's result, one file of it damaged."""
  shutil.copytree(workdir, copy)
  (copy / "pretrain" / "result.json").unlink()
  directory = copy / "pretrain" / "checkpoints" / str(LAST)
  (file,) = directory.glob(pattern)
  file.write_bytes(damage(file.read_bytes()))
  return copy


def overwrite(content):
  middle = len(content) // 2
  return content[:middle] + bytes(16) + content[middle + 16 :]


def truncate(content):
  return content[: len(content) // 3]


def test_spread_parameters_train_to_those_of_one_process(alone, together):
  """Shares of a batch are summed in another order: float32, 19 steps."""
  expected, found = final(alone), final(together)
  assert expected.keys() == found.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(
      found[name], array, rtol=2e-3, atol=2e-4, err_msg=name
    )
  np.testing.assert_allclose(
    loopback.losses(together, "pretrain"),
    loopback.losses(alone, "pretrain"),
    rtol=1e-4,
  )


# Damage that process 1 alone sees, in a copy of its own.
SEEN_BY_ONE = {
  "manifest": ("manifest/data.json", overwrite),
  "cut": (DATA.format(1), truncate),
  "bits": (DATA.format(0), overwrite),
}
# Damage of the files that all read.
SEEN_BY_ALL = {
  "all: manifest": ("manifest/data.json", overwrite),
  "all: cut": (DATA.format(1), truncate),
  "all: bits": (DATA.format(0), overwrite),
  "all: index": ("state/d/*", overwrite),
}


@pytest.fixture(scope="module")
def read(together, tmp_path_factory):
  """Directory of arrays, and lines by directory, that two processes read."""
  out = tmp_path_factory.mktemp("read")
  one, both = (
    [damaged(together, out / name, *how) for name, how in seen.items()]
    for seen in (SEEN_BY_ONE, SEEN_BY_ALL)
  )
  program = (loopback.__file__, out, together)
  commands = [(*program, *[together] * len(one), *both)]
  commands.append((*program, *one, *both))
  with loopback.started(commands) as running:
    codes, said = loopback.finish(running, timeout=120)
  assert codes == [0, 0], said
  lines = [
    [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for text in said
  ]
  names = ["whole", *SEEN_BY_ONE, *SEEN_BY_ALL]
  return out, {
    name: [each[2 * n : 2 * n + 2] for each in lines]
    for n, name in enumerate(names)
  }


def test_no_process_holds_the_whole_of_a_spread_array(read):
  _, lines = read
  for process in lines["whole"]:
    held = {line["parameters"]: line["held"] for line in process}
    assert held == {"replicated": 1, "sharded": 0.5}


def test_any_number_of_processes_reads_what_two_have_written(together, read):
  out, lines = read
  expected = final(together)
  for process in (0, 1):
    for line in lines["whole"][process]:
      assert (line["step"], line["warnings"]) == (LAST, [])
    for parameters in ("replicated", "sharded"):
      found = np.load(out / f"{parameters}_{process}.npz")
      assert found.keys() == expected.keys()
      for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", [*SEEN_BY_ONE, *SEEN_BY_ALL])
def test_damage_that_one_or_all_see_makes_all_take_the_one_before(read, name):
  _, lines = read
  for process in lines[name]:
    assert len(process) == 2
    for line in process:
      assert line["step"] == BEFORE
      (warning,) = line["warnings"]
      assert "damaged checkpoint" in warning
      assert warning.endswith(f"taking step {BEFORE}")


def test_a_damaged_shard_is_replaced_by_the_previous_checkpoint(
  together, tmp_path
):
  workdir = damaged(together, tmp_path / "run", DATA.format(1), overwrite)
  said = trained(2, workdir)
  for text in said:
    (warning,) = [x for x in text.splitlines() if x.startswith("warning: ")]
    assert f"damaged checkpoint {workdir}" in warning
    assert warning.endswith(f"taking step {BEFORE}")
    assert "Traceback" not in text
  assert f"resumes from step {BEFORE} of {LAST}" in said[0]
  expected, found = final(together), final(workdir)
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
  ):
    np.testing.assert_array_equal(b, a)
