import contextlib
import functools
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax.checkpoint import checkpoints as checkpoints_module
from dr_jax.checkpoint.checkpoints import (
  CheckpointError,
  Checkpoints,
  disk_bytes,
)
from dr_jax.checkpoint.snapshot import Snapshot


def training_state(seed=0):
  key = jax.random.key(seed)
  params = {
    "conv1": {"kernel": jax.random.normal(key, (3, 3, 4, 8))},
    "scale": jnp.array([1.5, -2.25, 3e-30], jnp.bfloat16),
  }
  return {
    "params": params,
    "optimizer": optax.adamw(1e-3).init(params),
    "codes": jnp.arange(256, dtype=jnp.uint8),
    "step": jnp.int32(seed),
    "key": jax.random.key(seed + 1),
    "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
  }


def assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for one, other in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    assert one.dtype == other.dtype
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
      one, other = jax.random.key_data(one), jax.random.key_data(other)
    assert one.shape == other.shape
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def abstract(state):
  return jax.eval_shape(lambda: state)


@pytest.mark.parametrize("like", [lambda state: state, abstract])
def test_a_state_comes_back_bit_for_bit(tmp_path, like):
  state = training_state()
  with Checkpoints(tmp_path / "new" / "directory") as checkpoints:
    checkpoints.save(3, state)
    assert_same_bits(checkpoints.restore(like=like(state)), state)


def test_restored_keys_continue_with_the_same_random_numbers(tmp_path):
  state = {"key": jax.random.key(7), "rbg": jax.random.key(7, impl="rbg")}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state)
    restored = checkpoints.restore(like=state)
  for name in state:
    np.testing.assert_array_equal(
      jax.random.bits(restored[name], (5,)), jax.random.bits(state[name], (5,))
    )


def test_nan_payloads_and_negative_zeros_survive(tmp_path):
  bits = jnp.array([0x7FC00001, 0x80000000, 0xFF800000], jnp.uint32)
  state = {"x": jax.lax.bitcast_convert_type(bits, jnp.float32)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state)
    assert_same_bits(checkpoints.restore(like=state), state)


def test_arrays_are_restored_to_the_shardings_of_like(tmp_path):
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, P("data"))
  whole = NamedSharding(mesh, P())
  state = {
    "x": jax.device_put(jnp.arange(8.0), split),
    "key": jax.device_put(jax.random.key(0), whole),
    "step": jnp.int32(1),
  }
  like = dict(state, x=jax.device_put(state["x"], whole))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state)
    same = checkpoints.restore(like=state)
    moved = checkpoints.restore(like=like)
  assert_same_bits(same, state)
  assert_same_bits(moved, state)
  assert (same["x"].sharding, moved["x"].sharding) == (split, whole)
  assert same["key"].sharding.is_equivalent_to(whole, 0)
  # Uncommitted arrays follow the others to the mesh; committed ones could not.
  assert not same["step"].committed
  assert (same["x"] * same["step"].astype(jnp.float32)).sharding == split


def test_a_snapshot_outlives_donation_and_keeps_its_devices(tmp_path):
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  split = NamedSharding(mesh, P(None, "x"))
  spread = jax.device_put(jnp.arange(48.0).reshape(4, 12), split)
  key = jax.device_put(jax.random.key(3), NamedSharding(mesh, P()))
  state = {"spread": spread, "key": key, "alone": jnp.int32(7)}
  want = jax.tree.map(lambda leaf: leaf.copy(), state)
  snapshot = Snapshot(state)
  for leaf in jax.tree.leaves(state):
    leaf.delete()
  assert snapshot.arrays["spread"].sharding.is_equivalent_to(split, 2)
  assert len(snapshot.arrays["alone"].sharding.device_set) == 1
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, snapshot)
    assert_same_bits(checkpoints.restore(like=want), want)


def test_donating_buffers_after_a_save_does_not_change_what_is_saved(tmp_path):
  @functools.partial(jax.jit, donate_argnums=0)
  def overwrite(state):
    return jax.tree.map(lambda x: -x, state)

  def fresh():
    return {"x": jnp.arange(2_000_000.0), "y": jnp.ones((1000, 1000))}

  state = fresh()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state)
    for _ in range(3):
      state = overwrite(state)
    jax.block_until_ready(state)
    assert_same_bits(checkpoints.restore(like=state), fresh())


def test_only_the_newest_checkpoints_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
      checkpoints.save(step, {"x": jnp.full(3, step)})
    checkpoints.wait()
    assert checkpoints.latest() == 15
    assert sorted(os.listdir(tmp_path)) == ["10", "15"]
    assert checkpoints.restore(10, like={"x": jnp.zeros(3, int)})["x"][0] == 10


def test_a_blocking_save_is_on_disk_when_it_returns(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": jnp.ones(1_000_000)}, blocking=True)
    assert os.listdir(tmp_path) == ["1"]


def test_saving_an_earlier_step_discards_the_later_ones(tmp_path):
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    for step, value in [(10, 1), (20, 2), (30, 3), (20, 4)]:
      checkpoints.save(step, {"x": jnp.int32(value)})
    assert checkpoints.latest() == 20
    assert checkpoints.restore(like={"x": jnp.int32(0)})["x"] == 4
    assert sorted(os.listdir(tmp_path)) == ["10", "20"]


def test_a_removed_step_can_be_saved_again(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 4, 2):
      checkpoints.save(step, {"x": jnp.int32(step)}, blocking=True)
    assert checkpoints.latest() == 2
    assert checkpoints.restore(like={"x": jnp.int32(0)})["x"] == 2
  assert not {"3", "4"} & {path.name for path in tmp_path.iterdir()}


def test_opening_removes_incomplete_saves_and_leaves_no_thread(tmp_path):
  (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
  code = (
    "import sys; from dr_jax.checkpoint import Checkpoints\n"
    "with Checkpoints(sys.argv[1]) as c: assert c.latest() is None"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, tmp_path],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert os.listdir(tmp_path) == []


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with Checkpoints("run") as checkpoints:
    monkeypatch.chdir("/")
    checkpoints.save(0, {"x": jnp.ones(2)}, blocking=True)
  assert os.listdir(tmp_path / "run") == ["0"]


_SAVE_FOR_EVER = """
import sys, jax.numpy as jnp
from dr_jax.checkpoint.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
for step in range(1, 1_000_000):
  state = {"x": jnp.full((1000, 1000), step), "n": step * jnp.ones(5)}
  checkpoints.save(step, state)
"""


def test_a_process_killed_while_saving_leaves_the_last_checkpoint(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  half_written = []
  for _ in range(5):
    saver = subprocess.Popen(
      [sys.executable, "-c", _SAVE_FOR_EVER, tmp_path], cwd=root
    )
    # Killed once a checkpoint is complete and another one is being written.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and saver.poll() is None:
      names = os.listdir(tmp_path)
      if len(names) > 1 and not all(name.isdecimal() for name in names):
        break
    saver.send_signal(signal.SIGKILL)
    assert saver.wait() == -signal.SIGKILL
    names = os.listdir(tmp_path)
    complete = [int(name) for name in names if name.isdecimal()]
    half_written = [name for name in names if not name.isdecimal()]
    if half_written:
      break
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
  assert half_written, "never killed in the middle of a save"
  with Checkpoints(tmp_path) as checkpoints:
    step = checkpoints.latest()
    assert step == max(complete)
    like = {"x": jnp.zeros((1000, 1000), int), "n": jnp.zeros(5)}
    state = checkpoints.restore(like=like)
    np.testing.assert_array_equal(state["x"], step)
    np.testing.assert_array_equal(state["n"], step)
    checkpoints.save(step + 1, state, blocking=True)
  assert all(name.isdecimal() for name in os.listdir(tmp_path))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_run_never_takes_more_disk_than_estimated(tmp_path, keep):
  def largest(directory):
    total = 0
    for file in directory.rglob("*"):
      with contextlib.suppress(FileNotFoundError):
        total += file.stat().st_size
    return total

  # Many small arrays, a key, and one array that counts.
  state = training_state() | {
    "small": {str(i): jnp.full(7, i) for i in range(100)},
    "large": jax.random.normal(jax.random.key(0), (1000, 1000)),
  }
  seen = []
  with Checkpoints(tmp_path, keep=keep) as checkpoints:
    for step in range(keep + 2):
      checkpoints.save(step, state)
      for _ in range(20):
        seen.append(largest(tmp_path))
    checkpoints.wait()
    seen.append(largest(tmp_path))
  foretold = disk_bytes(state, keep=keep)
  assert foretold == disk_bytes(abstract(state), keep=keep)
  # What is kept is there, a tenth smaller by Orbax's compression.
  assert 0.9 * keep * 4_000_000 < max(seen) <= foretold
  # And no more than twice of what the arrays take.
  assert foretold < 2 * (keep + 1) * 4_000_000


def test_bytes_of_keys_and_of_every_dtype_are_counted():
  arrays = {
    "key": jax.random.split(jax.random.key(0), 3),
    "half": jnp.zeros((5, 2), jnp.bfloat16),
    "byte": jnp.zeros((), jnp.uint8),
  }
  empty = disk_bytes({name: jnp.zeros(0) for name in arrays}, keep=4)
  assert disk_bytes(arrays, keep=4) - empty == 5 * (3 * 8 + 5 * 2 * 2 + 1)


@pytest.mark.parametrize("call", ["save(3, state)", "wait()", "close()"])
def test_a_failed_save_is_one_line_and_keeps_earlier_checkpoints(
  tmp_path, call
):
  # Files of more than 5000 bytes cannot be written, as on a full disk.
  code = (
    "import resource, sys, jax.numpy as jnp\n"
    "from dr_jax.checkpoint import CheckpointError, Checkpoints\n"
    "checkpoints = Checkpoints(sys.argv[1])\n"
    "checkpoints.save(1, {'x': jnp.ones(10)}, blocking=True)\n"
    "limits = resource.RLIMIT_FSIZE, (5000, 5000)\n"
    "resource.setrlimit(*limits)\n"
    "state = {'x': jnp.arange(100_000.0)}\n"
    "try:\n"
    "  checkpoints.save(2, state)\n"
    f"  checkpoints.{call}\n"
    "except CheckpointError as error:\n"
    "  print(error)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, tmp_path],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert done.stdout.count("\n") == 1, done.stderr
  assert done.stdout.startswith(f"{tmp_path}: a checkpoint could not be saved,")
  assert "that of step 1 is kept (" in done.stdout
  assert "too large" in done.stdout
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 1
    state = checkpoints.restore(like={"x": jnp.zeros(10)})
  np.testing.assert_array_equal(state["x"], 1)


def files(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
  "damage",
  [
    flip_a_bit,
    *(pytest.param(d, marks=pytest.mark.slow) for d in (truncate, os.unlink)),
  ],
)
def test_no_damaged_file_ever_yields_a_wrong_state(tmp_path, damage):
  like = training_state()
  saved = tmp_path / "saved"
  with Checkpoints(saved) as checkpoints:
    checkpoints.save(1, training_state(1))
  detected = 0
  for number, file in enumerate(files(saved)):
    copy = tmp_path / str(number)
    shutil.copytree(saved, copy)
    damage(copy / file.relative_to(saved))
    with Checkpoints(copy) as checkpoints:
      try:
        state = checkpoints.restore(like=like)
      except CheckpointError as error:
        assert str(copy) in str(error)
        assert "\n" not in str(error)
        detected += 1
      else:
        assert_same_bits(state, training_state(1))
  # At the least: the manifest, the tree, the index and the arrays.
  assert detected >= 4


def damage_all(directory):
  for file in files(directory):
    truncate(file)


def test_a_damaged_latest_checkpoint_is_replaced_by_the_previous_one(tmp_path):
  like = training_state()
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, training_state(step), blocking=True)
    largest = max(files(tmp_path / "2"), key=lambda file: file.stat().st_size)
    flip_a_bit(largest)
    with pytest.warns(UserWarning, match=rf"damaged .*{tmp_path}/2: .* step 1"):
      state = checkpoints.restore(like=like)
    assert_same_bits(state, training_state(1))
    with pytest.raises(CheckpointError, match=f"damaged .*{tmp_path}/2: check"):
      checkpoints.restore(2, like=like)
    # The resumed run comes to step 2 again and replaces what is damaged.
    checkpoints.save(2, training_state(22))
    assert_same_bits(checkpoints.restore(like=like), training_state(22))


def test_reads_that_an_error_leaves_behind_print_nothing(tmp_path, monkeypatch):
  """Orbax reads many arrays at once, and abandons all at the first error."""
  noise = np.random.default_rng(0).random((100, 100, 100), np.float32)
  state = {f"w{n}": jnp.asarray(each) for n, each in enumerate(noise)}
  printed = []
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state)
  truncate(max(files(tmp_path / "2"), key=lambda file: file.stat().st_size))
  monkeypatch.setattr(sys, "unraisablehook", printed.append)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.warns(UserWarning, match="taking step 1"):
      checkpoints.restore(like=state)
  gc.collect()
  assert not printed


def test_a_changed_manifest_of_valid_json_is_damage(
  tmp_path,
):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"x": jnp.int32(step)}, blocking=True)
    (manifest,) = (tmp_path / "2" / "manifest").glob("*.json")
    text = manifest.read_text()
    assert "int32" in text
    manifest.write_text(text.replace("int32", "int31"))
    message = "damaged .*/2: checksum of the manifest differs; taking step 1"
    with pytest.warns(UserWarning, match=message):
      assert checkpoints.restore(like={"x": jnp.int32(0)})["x"] == 1


def test_a_state_of_another_shape_does_not_fall_back(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": jnp.int32(1)}, blocking=True)
    checkpoints.save(2, {"y": jnp.int32(2)}, blocking=True)
    with pytest.raises(CheckpointError, match="/2 holds another state"):
      checkpoints.restore(like={"x": jnp.int32(0)})


def test_all_processes_skip_what_one_cannot_read(tmp_path, monkeypatch):
  # Each restore asks twice, once it has read and once it has compared.
  answers = iter([False, True, True])
  monkeypatch.setattr(checkpoints_module, "all_agree", lambda _: next(answers))
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"x": jnp.int32(step)}, blocking=True)
    with pytest.warns(UserWarning, match="/2: another process cannot read it"):
      state = checkpoints.restore(like={"x": jnp.int32(0)})
  assert state["x"] == 1


def test_if_all_are_damaged_the_latest_is_named(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, training_state(step), blocking=True)
      damage_all(tmp_path / str(step))
    with pytest.raises(CheckpointError, match=f"damaged .*{tmp_path}/2: "):
      checkpoints.restore(like=training_state())


@pytest.mark.parametrize(
  ("like", "difference"),
  [
    ({"a": {"x": jnp.zeros(3), "y": jnp.zeros(2)}}, "it lacks a/y"),
    ({"a": {}}, "it has a/x, which is not asked for"),
    ({"a": {"x": jnp.zeros(4)}}, r"a/x is float32\[3\], not float32\[4\]"),
    ({"a": {"x": jnp.zeros(3, int)}}, r"a/x is float32\[3\], not int32\[3\]"),
    (
      {"a": {"x": jax.random.split(jax.random.key(0), 3)}},
      r"a/x is float32\[3\], not key<fry>\[3\]",
    ),
  ],
)
def test_another_state_is_an_error_that_says_what_differs(
  tmp_path, like, difference
):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"a": {"x": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/1 .*{difference}$"):
      checkpoints.restore(like=like)


def test_a_missing_checkpoint_is_an_error_that_lists_what_there_is(tmp_path):
  like = {"x": jnp.ones(1)}
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match=r"^no checkpoint in .*: none\)$"):
      checkpoints.restore(like=like)
    checkpoints.save(4, like)
    with pytest.raises(CheckpointError, match=r"of step 5 .*are: 4\)$"):
      checkpoints.restore(5, like=like)


def test_a_leaf_that_is_not_an_array_raises_an_error_that_names_it(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(TypeError, match=r"^a/step is of type int"):
      checkpoints.save(0, {"a": {"step": 3}})


def test_leaves_of_one_path_are_an_error(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="same path"):
      checkpoints.save(0, {"a/b": jnp.ones(1), "a": {"b": jnp.zeros(1)}})


def test_saving_and_restoring_give_no_warning(tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(0, training_state())
      checkpoints.restore(like=abstract(training_state()))
