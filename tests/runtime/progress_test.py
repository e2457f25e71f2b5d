import io

import jax.numpy as jnp
import pytest
import rich.console

from dr_jax.runtime.progress import Lossy, Progress


class Clock:
  """A clock that goes when it is told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def run(stage, total, seconds, *, start=0, terminal=False, texts=(), width=100):
  """Returns what a stage of one step per `seconds` shows."""
  file, clock = io.StringIO(), Clock()
  console = rich.console.Console(
    file=file, force_terminal=terminal, width=width, color_system=None
  )
  progress = Progress(
    stage, total, start=start, interval=5.0, console=console, clock=clock
  )
  with progress:
    for step in range(start + 1, total + 1):
      clock.now += seconds
      progress.update(step, examples=128, losses=jnp.float32(1 / step))
      for text in texts:
        progress.print(text)
  return file.getvalue()


def test_without_a_terminal_there_is_a_line_every_five_seconds_and_a_last():
  assert run("train", 12, 1.0).splitlines() == [
    "train  step 5/12  loss 0.2  128 examples/s  0:07 left",
    "train  step 10/12  loss 0.1  128 examples/s  0:02 left",
    "train  step 12/12  loss 0.08333  128 examples/s  0:00 left",
  ]


def test_speed_and_time_left_leave_out_compilation_and_steps_of_before():
  file, clock = io.StringIO(), Clock()
  console = rich.console.Console(file=file, width=100)
  with Progress(
    "train", 1000, start=700, console=console, clock=clock
  ) as progress:
    clock.now += 600  # compiles
    progress.update(701, examples=10)
    for step in range(702, 713):
      clock.now += 0.5
      progress.update(step, examples=10)
  assert file.getvalue().splitlines() == [
    "train  step 701/1000",
    "train  step 711/1000  20 examples/s  2:24 left",
    "train  step 712/1000  20 examples/s  2:24 left",
  ]


@pytest.mark.parametrize(
  ("seconds_per_step", "left"), [(3, "5:54 left"), (60, "1:57:00 left")]
)
def test_time_left_is_in_minutes_or_hours(seconds_per_step, left):
  lines = run("train", 120, seconds_per_step).splitlines()
  assert any(line.endswith(f"  {left}") for line in lines)


def test_a_loss_that_is_not_shown_is_not_waited_for():
  class Pending:
    def __array__(self, *_):
      raise AssertionError("waited for")

  console = rich.console.Console(file=io.StringIO())
  clock = Clock()
  with Progress("train", 10, console=console, clock=clock) as progress:
    for step in range(1, 10):
      progress.update(step, losses=Pending())
    clock.now += 60
    with pytest.raises(AssertionError, match="waited for"):
      progress.update(9, losses=Pending())
    progress.update(10, losses=0.0)


def test_a_terminal_gets_a_bar_that_ends_full():
  shown = run("train", 4, 1.0, terminal=True)
  last = shown.splitlines()[-2]  # the last one shows the cursor again
  assert "train ━━━" in last
  assert "step 4/4  loss 0.25  128 examples/s  0:00 left" in last


@pytest.mark.parametrize("terminal", [False, True])
def test_printed_text_gets_its_own_line(terminal):
  text = "bits [8, 4] [bold]saved[/bold] :smile: " + "/long" * 40
  shown = run("train", 2, 1.0, terminal=terminal, texts=[text])
  lines = [line.removeprefix("\x1b[2K") for line in shown.splitlines()]
  assert lines.count(text) == 2


def test_a_stage_name_is_shown_as_it_is():
  for terminal in (False, True):
    assert "[bold]x[/bold]" in run("[bold]x[/bold]", 1, 1.0, terminal=terminal)


@pytest.mark.parametrize("width", [1, 20, 79])
def test_a_narrow_terminal_has_lines_with_all_numbers(width):
  file, clock = io.StringIO(), Clock()
  console = rich.console.Console(
    file=file, force_terminal=True, width=width, color_system=None
  )
  with Progress("train", 12, console=console, clock=clock) as progress:
    for step in range(1, 13):
      clock.now += 1
      progress.update(step, examples=128, losses=jnp.float32(1 / step))
  assert file.getvalue().splitlines()[0] == (
    "train  step 5/12  loss 0.2  128 examples/s  0:07 left"
  )


def test_the_numbers_beside_a_bar_are_whole():
  shown = run("multi_precision", 12, 1.0, terminal=True, width=80)
  assert "step 12/12  loss 0.08333  128 examples/s  0:00 left" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_losses_at_several_bit_widths_and_a_note_are_shown(terminal):
  file, clock = io.StringIO(), Clock()
  console = rich.console.Console(
    file=file, force_terminal=terminal, width=80, color_system=None
  )
  progress = Progress(
    "train", 9, labels=(8, 2), console=console, clock=clock, interval=5.0
  )
  with progress:
    for step in range(1, 10):
      clock.now += 1
      progress.update(step, examples=4, losses=jnp.array([0.125, 1.5]))
      if step == 6:
        progress.note("validation accuracy % 98.10/97.30")
  lines = file.getvalue().splitlines()
  numbers = "loss 0.125/1.5 at 8/2 bits"
  score = "validation accuracy % 98.10/97.30"
  if not terminal:
    assert lines == [
      f"train  step 5/9  {numbers}  4 examples/s  0:04 left",
      f"train  step 9/9  {numbers}  {score}  4 examples/s  0:00 left",
    ]
    return
  bar, *others = [line.strip() for line in lines[-4:-1]]
  assert "━━━" in bar and bar.endswith("step 9/9  4 examples/s  0:00 left")
  assert others == [numbers, score]


def test_a_note_after_the_last_step_is_shown():
  file = io.StringIO()
  console = rich.console.Console(file=file, width=100)
  with Progress("train", 1, console=console, interval=0.0) as progress:
    progress.update(1, losses=jnp.float32(0.5))
    progress.note("validation accuracy % 98.10")
  assert file.getvalue().splitlines() == [
    "train  step 1/1  loss 0.5",
    "train  step 1/1  loss 0.5  validation accuracy % 98.10",
  ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_that_went_away_does_not_end_a_stage(terminal):
  class Gone(io.StringIO):
    def write(self, text):
      raise BrokenPipeError

    def flush(self):
      raise OSError(28, "No space left on device")

  for stream in (Gone(), None):
    console = rich.console.Console(
      file=Lossy(stream), force_terminal=terminal, width=100
    )
    clock = Clock()
    with Progress("train", 9, console=console, clock=clock) as progress:
      for step in range(1, 10):
        clock.now += 3
        progress.update(step, examples=1, losses=1.0)
      progress.print("a line")
