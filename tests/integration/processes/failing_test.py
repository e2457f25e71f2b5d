"""One of several real processes that fails: the others must not wait for it.

What fails is put in from outside: an error where arrays are written, one that
nobody thought of, a kill in the middle of a save.
"""

import time

import loopback
import pytest

# The second checkpoint, of step 12, is the one that fails.
FLAGS = (
  "--config=configs/digits.py",
  "--config.stages=('pretrain',)",
  "--config.model.options.widths=(4, 4, 4)",
  "--config.pretrain.epochs=4",
  "--config.checkpoint_every=6",
)
VICTIM = """
import os, runpy, signal, sys
from dr_jax.train import loop
from orbax.checkpoint import v1

saves, save, take = [], v1.handlers.PyTreeHandler.save, loop._Losses._take

async def full(self, directory, checkpointable):
  written = await save(self, directory, checkpointable)
  saves.append(written)

  async def commit():
    raise OSError(28, "No space left on device")

  return written if len(saves) < 2 else commit()

async def killed(self, directory, checkpointable):
  saves.append(None)
  if len(saves) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  return await save(self, directory, checkpointable)

def unexpected(self, progress):
  if self._pending[0][0] == 8:
    raise AttributeError("nobody thought of this")
  return take(self, progress)

how = sys.argv.pop(1)
if how == "unexpected":
  loop._Losses._take = unexpected
else:
  v1.handlers.PyTreeHandler.save = {"full": full, "killed": killed}[how]
sys.argv[0] = "dr_jax.main"
runpy.run_module("dr_jax.main", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("how", "victim", "code"),
  [
    ("full", 0, 2),
    ("full", 1, 2),
    ("unexpected", 1, 1),
    ("killed", 0, -9),
  ],
)
def test_the_others_end_within_a_minute(tmp_path, how, victim, code):
  workdir = tmp_path / "run"
  flags = (*FLAGS, f"--workdir={workdir}")
  commands = [("-m", "dr_jax.main", *flags)] * 2
  commands[victim] = ("-c", VICTIM, how, *flags)
  with loopback.started(commands) as running:
    failed, other = running[victim], running[1 - victim]
    text, _ = failed.communicate(timeout=120)
    ended = time.monotonic()
    said, _ = other.communicate(timeout=60)
    assert time.monotonic() - ended < 60
  assert failed.returncode == code, text
  if how == "full":
    assert "error: " in text and "No space left on device" in text
    assert "that of step 6 is kept" in text
  if how == "unexpected":
    assert "AttributeError: nobody thought of this" in text
  # JAX ends a process itself where its heartbeat notices first.
  by_jax = "another task died" in said and other.returncode not in (0, None)
  assert by_jax or "error: another process has ended" in said, said
  assert by_jax or other.returncode == 3
  # Only what is complete has a number.
  kept = {
    int(path.name)
    for path in (workdir / "pretrain" / "checkpoints").iterdir()
    if path.name.isdecimal()
  }
  assert max(kept) == 6
