import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from dr_jax.runtime.metrics import MetricsWriter, Progress


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


class Clock:
  """A clock that goes when it is told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def run(stage, total, seconds, *, start=0, terminal=False, texts=()):
  """Returns what a stage of one step per `seconds` shows."""
  file, clock = io.StringIO(), Clock()
  console = rich.console.Console(
    file=file, force_terminal=terminal, width=100, color_system=None
  )
  progress = Progress(
    stage, total, start=start, interval=5.0, console=console, clock=clock
  )
  with progress:
    for step in range(start + 1, total + 1):
      clock.now += seconds
      progress.update(step, images=128, loss=jnp.float32(1 / step))
      for text in texts:
        progress.print(text)
  return file.getvalue()


def test_without_a_terminal_there_is_a_line_every_five_seconds_and_a_last():
  assert run("train", 12, 1.0).splitlines() == [
    "train  step 5/12  loss 0.2  128 images/s  0:07 left",
    "train  step 10/12  loss 0.1  128 images/s  0:02 left",
    "train  step 12/12  loss 0.08333  128 images/s  0:00 left",
  ]


def test_speed_and_time_left_leave_out_compilation_and_steps_of_before():
  file, clock = io.StringIO(), Clock()
  console = rich.console.Console(file=file, width=100)
  with Progress(
    "train", 1000, start=700, console=console, clock=clock
  ) as progress:
    clock.now += 600  # compiles
    progress.update(701, images=10)
    for step in range(702, 713):
      clock.now += 0.5
      progress.update(step, images=10)
  assert file.getvalue().splitlines() == [
    "train  step 701/1000",
    "train  step 711/1000  20 images/s  2:24 left",
    "train  step 712/1000  20 images/s  2:24 left",
  ]


@pytest.mark.parametrize(
  ("seconds_per_step", "left"), [(3, "5:54 left"), (60, "1:57:00 left")]
)
def test_time_left_is_in_minutes_or_hours(seconds_per_step, left):
  lines = run("train", 120, seconds_per_step).splitlines()
  assert any(line.endswith(f"  {left}") for line in lines)


def test_a_loss_that_is_not_shown_is_not_waited_for():
  class Pending:
    def __float__(self):
      raise AssertionError("waited for")

  console = rich.console.Console(file=io.StringIO())
  clock = Clock()
  with Progress("train", 10, console=console, clock=clock) as progress:
    for step in range(1, 10):
      progress.update(step, loss=Pending())
    clock.now += 60
    with pytest.raises(AssertionError, match="waited for"):
      progress.update(9, loss=Pending())
    progress.update(10, loss=0.0)


def test_a_terminal_gets_a_bar_that_ends_full():
  shown = run("train", 4, 1.0, terminal=True)
  last = shown.splitlines()[-2]  # the last one shows the cursor again
  assert "train ━━━" in last
  assert "step 4/4  loss 0.25  128 images/s  0:00 left" in last


@pytest.mark.parametrize("terminal", [False, True])
def test_printed_text_gets_a_line_of_its_own(terminal):
  text = "bits [8, 4] [bold]saved[/bold] :smile: " + "/long" * 40
  shown = run("train", 2, 1.0, terminal=terminal, texts=[text])
  lines = [line.removeprefix("\x1b[2K") for line in shown.splitlines()]
  assert lines.count(text) == 2


def test_a_stage_name_is_shown_as_it_is():
  for terminal in (False, True):
    assert "[bold]x[/bold]" in run("[bold]x[/bold]", 1, 1.0, terminal=terminal)


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
      writer.write(stage, step, {"images_per_second": speed, "loss": 9.0})
    seconds = writer.training_seconds("joint", images_per_step=8)
    assert seconds == pytest.approx(30 * 8 / 100 + 10 * 8 / 50)
    assert writer.training_seconds("absent", images_per_step=8) == 0
