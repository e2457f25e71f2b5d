import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.runtime.metrics import MetricsWriter


def records(path):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  return [
    json.loads(line, parse_constant=refuse)
    for line in path.read_text().splitlines()
  ]


def test_each_value_is_one_json_line(tmp_path):
  path = tmp_path / "new" / "metrics.jsonl"
  with MetricsWriter(path) as writer:
    writer.write("train", 3, {"loss": jnp.float32(0.5), "n": 7}, bits=4)
    writer.write("train", jnp.int32(4), {"accuracy": np.float64(0.25)})
  assert path.read_text().splitlines()[0] == (
    '{"stage": "train", "step": 3, "bits": 4, "name": "loss", "value": 0.5}'
  )
  assert [tuple(record.values()) for record in records(path)] == [
    ("train", 3, 4, "loss", 0.5),
    ("train", 3, 4, "n", 7),
    ("train", 4, None, "accuracy", 0.25),
  ]


def test_what_is_written_is_on_disk_before_the_writer_closes(tmp_path):
  writer = MetricsWriter(tmp_path / "metrics.jsonl")
  writer.write("train", 1, {"loss": 1.0})
  assert len(records(tmp_path / "metrics.jsonl")) == 1
  writer.close()


@pytest.mark.parametrize(
  ("value", "written"),
  [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")],
)
@pytest.mark.parametrize("as_scalar", [float, np.float32, jnp.float32])
def test_a_value_that_is_not_finite_is_a_string(
  tmp_path, value, written, as_scalar
):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(path) as writer:
    writer.write("train", 1, {"loss": as_scalar(value)})
  assert records(path)[0]["value"] == written
  assert str(float(written)) == str(value)


@pytest.mark.parametrize("torn", ["", '{"stage": "train", "st', "{"])
def test_opening_a_file_drops_its_torn_last_line(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(path) as writer:
    writer.write("train", 1, {"loss": 1.0})
  with path.open("a") as file:
    file.write(torn)
  with MetricsWriter(path) as writer:
    writer.write("train", 2, {"loss": 2.0})
  assert [record["value"] for record in records(path)] == [1.0, 2.0]


def test_a_resumed_stage_rewrites_its_later_steps_and_no_others(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(path) as writer:
    writer.write("pretrain", 9, {"loss": 0.0})
    for step in (1, 2, 3, 4):
      writer.write("train", step, {"loss": float(step)})
  with MetricsWriter(path) as writer:
    writer.resume("train", 2)
    writer.write("train", 3, {"loss": 30.0})
  assert [(r["stage"], r["step"], r["value"]) for r in records(path)] == [
    ("pretrain", 9, 0.0),
    ("train", 1, 1.0),
    ("train", 2, 2.0),
    ("train", 3, 30.0),
  ]
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_training_seconds_are_steps_times_the_median_speed_of_each_phase(
  tmp_path,
):
  with MetricsWriter(tmp_path / "m.jsonl") as writer:
    for stage, step, speed in (
      ("joint/first", 10, 5.0),  # with compilation
      ("joint/first", 20, 100.0),
      ("joint/first", 30, 100.0),
      ("joint/second", 10, 50.0),
      ("jointly", 10, 1.0),
      ("float", 10, 1.0),
    ):
      writer.write(stage, step, {"examples_per_second": speed, "loss": 9.0})
    seconds = writer.training_seconds("joint", examples_per_step=8)
    assert seconds == pytest.approx(30 * 8 / 100 + 10 * 8 / 50)
    assert writer.training_seconds("absent", examples_per_step=8) == 0
