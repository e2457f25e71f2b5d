"""Tests of what sinks get of the numbers of a run, and where it goes."""

import importlib.util
import struct
import sys
import types

import numpy as np
import pytest

from dr_jax.runtime import sinks
from dr_jax.runtime.metrics import MetricsWriter


class Recorded:
  """A sink that remembers what it is given."""

  def __init__(self):
    self.events = []

  def write(self, stage, step, values, *, bits):
    self.events.append((stage, step, bits, values))

  def resume(self, stage, step):
    self.events.append((stage, step))


def test_a_sink_gets_numbers_but_not_those_of_an_open_mean(tmp_path):
  sink = Recorded()
  with MetricsWriter(tmp_path / "m.jsonl", [sink]) as metrics:
    metrics.resume("joint", 3)
    metrics.write("joint", np.int32(4), {"loss": np.float32(0.5)}, bits=8)
    metrics.write("joint", 4, {"losses": 2})
    metrics.write("joint", 4, {"loss_sum": 1.0}, bits=8)
    metrics.resume("joint", 4, names=("loss",))
  assert sink.events == [("joint", 3), ("joint", 4, 8, {"loss": 0.5})]


def log(name, workdir):
  """Two starts of a run with a stage of two bit-widths; the second resumes."""
  for start, steps in ((0, (1, 2)), (1, (2, 3))):
    (sink,) = sinks.make([name], workdir, {"name": "mine", "seed": 3})
    with MetricsWriter(workdir / "metrics.jsonl", [sink]) as metrics:
      metrics.resume("joint", start)
      for step in steps:
        metrics.write("joint", step, {"loss": step / 2}, bits=8)
        metrics.write("joint", step, {"examples_per_second": 7})
    sink.close()


def events(path):
  """The events of a file of TensorBoard, records with lengths and checksums."""
  from tensorboardX.proto.event_pb2 import Event

  data = path.read_bytes()
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    yield Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]


def test_tensorboard_hides_what_a_stage_that_resumes_writes_again(tmp_path):
  pytest.importorskip("tensorboardX", reason="needs dr_jax[tensorboard]")
  log("tensorboard", tmp_path)
  paths = sorted((tmp_path / "tensorboard" / "joint").iterdir())
  seen = {}
  for path in paths:
    for event in events(path):
      if event.HasField("session_log"):
        seen = {k: v for k, v in seen.items() if k[1] < event.step}
      for value in event.summary.value:
        assert (value.tag, event.step) not in seen
        seen[value.tag, event.step] = value.simple_value
  assert {k: v for k, v in seen.items() if k[0] == "loss/8"} == {
    ("loss/8", step): step / 2 for step in (1, 2, 3)
  }
  assert seen["examples_per_second", 3] == 7


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of wandb's own
def test_weights_and_biases_gets_numbers_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="needs dr_jax[wandb]")
  for name, value in {"MODE": "offline", "SILENT": "true"}.items():
    monkeypatch.setenv(f"WANDB_{name}", value)
  log("wandb", tmp_path)
  number = (tmp_path / "wandb-run-id").read_text()
  runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
  assert len(runs) == 2
  written = set()
  for run in runs:
    (file,) = run.glob("*.wandb")
    assert file.stem == f"run-{number}"
    written |= {
      key
      for key in (b"joint/step", b"joint/loss/8", b"joint/examples_per_second")
      if key in file.read_bytes()
    }
  assert len(written) == 3


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_what_weights_and_biases_refuses_names_the_flag(
  tmp_path, monkeypatch, kind
):
  def init(**_):
    raise kind("mode must be online or offline")

  wandb = types.SimpleNamespace(Error=RuntimeError, init=init)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  sink = sinks.WandB(tmp_path, {})
  with pytest.raises(ValueError, match="^log_to=wandb: mode must be online"):
    sink.write("joint", 1, {"loss": 0.5}, bits=8)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_sink_opens_nothing_before_the_first_number(
  tmp_path, monkeypatch, name
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
  (sink,) = sinks.make([name, name], tmp_path, {})
  sink.resume("joint", 0)
  sink.close()
  assert not list(tmp_path.iterdir())


def test_an_unknown_sink_or_an_absent_package_is_named(tmp_path, monkeypatch):
  with pytest.raises(
    ValueError, match="must be of tensorboard, wandb, got 'x'"
  ):
    sinks.make(["x"], tmp_path, {})
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  message = r"log_to=wandb needs wandb: pip install 'dr_jax\[wandb\]'"
  with pytest.raises(ValueError, match=message):
    sinks.make(["wandb"], tmp_path, {})
