"""Tests of the loop: NaN, interruption, resumption."""

import itertools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.checkpoint.snapshot import Snapshot
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.train import InterruptedRun, Loop, NonFiniteError, TrainState
from dr_jax.train import loop as loop_module


def _state():
  return TrainState(
    step=jnp.int32(0),
    params={"w": jnp.zeros(2)},
    opt_state={"m": jnp.zeros(2)},
    batch_stats={"mean": jnp.zeros(1)},
    key=jax.random.key(0),
    memory={},
  )


class _Batches:
  def __getitem__(self, step):
    return {"label": np.full(4, step, np.int32)}


def _step(nan_at=None, poison=None, spoil=None, skew=None):
  def step(state, batch):
    number = int(batch["label"][0]) + 1
    params = {"w": state.params["w"] + number}
    losses = jnp.array([1.0, jnp.nan if number == nan_at else 2.0])
    if number == poison:
      params = {"w": params["w"] * jnp.inf}
    opt_state = {"m": jnp.full(2, jnp.nan if number == spoil else 0.0)}
    stats = {"mean": jnp.full(1, jnp.inf if number == skew else 0.0)}
    state = state._replace(
      params=params, opt_state=opt_state, batch_stats=stats
    )
    return state._replace(step=state.step + 1), losses, {}

  return step


def _loop(tmp_path, checkpoints, metrics=None, **options):
  defaults = dict(
    stage="joint",
    steps=10,
    labels=(8, 2),
    step=_step(),
    batches=_Batches(),
    checkpoints=checkpoints,
    metrics=metrics,
    checkpoint_every=4,
    log_every=5,
  )
  return Loop(**(defaults | options))


def test_a_nan_loss_names_step_and_bits_and_keeps_the_last_checkpoint(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, step=_step(nan_at=7))
    message = "joint: loss is nan at step 7, 2 bits; the checkpoint of step 4"
    with pytest.raises(NonFiniteError, match=message):
      loop.run(_state())
    restored = checkpoints.restore(like=_state())
    assert int(restored.step) == 4
    np.testing.assert_array_equal(restored.params["w"], 1 + 2 + 3 + 4)


def test_an_infinite_parameter_is_never_saved(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, step=_step(poison=8))
    with pytest.raises(NonFiniteError, match="after step 8; .* step 4 is kept"):
      loop.run(_state())
    assert checkpoints.latest() == 4


def test_a_signal_saves_a_checkpoint_and_a_second_run_ends_the_same(tmp_path):
  calls = iter([None, None, "SIGTERM"])
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, interrupted=lambda: next(calls, None))
    with pytest.raises(
      InterruptedRun,
      match="joint: stopped by SIGTERM after step 3 of 10; saved",
    ):
      loop.run(_state())
    assert checkpoints.latest() == 3
    resumed = checkpoints.restore(like=_state())
    state = _loop(tmp_path, checkpoints).run(resumed)
  whole = _loop(tmp_path, None).run(_state())
  np.testing.assert_array_equal(state.params["w"], whole.params["w"])
  assert int(state.step) == 10


def test_metrics_hold_the_mean_loss_of_each_bit_width(tmp_path):
  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    _loop(tmp_path, None, metrics).run(_state())
  records = [
    json.loads(x) for x in (tmp_path / "m.jsonl").read_text().splitlines()
  ]
  losses = [
    (r["step"], r["bits"], r["value"]) for r in records if r["name"] == "loss"
  ]
  assert losses == [(5, 8, 1.0), (5, 2, 2.0), (10, 8, 1.0), (10, 2, 2.0)]


def test_what_a_step_logs_is_written_of_the_steps_that_are_logged(tmp_path):
  plain = _step()

  def step(state, batch):
    state, losses, _ = plain(state, batch)
    norm = jnp.array([0.5, jnp.inf]) * float(state.step)
    return state, losses, {"norm": norm}

  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    _loop(tmp_path, None, metrics, step=step, steps=7).run(_state())
    assert metrics.values("joint", 5, "norm") == {8: 2.5, 2: np.inf}
    assert metrics.values("joint", 7, "norm") == {8: 3.5, 2: np.inf}
    assert metrics.values("joint", 7, "loss") == {8: 1.0, 2: 2.0}
    assert metrics.values("joint", 6, "norm") == {}


def test_an_optimizer_state_with_nan_is_not_saved(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, step=_step(spoil=8))
    message = "its optimizer is NaN or infinite after step 8; .* step 4 is kept"
    with pytest.raises(NonFiniteError, match=message):
      loop.run(_state())
    assert checkpoints.latest() == 4


def test_infinite_statistics_are_not_saved(tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, step=_step(skew=8))
    with pytest.raises(NonFiniteError, match="after step 8; .* step 4 is kept"):
      loop.run(_state())


class _Recorded:
  """Checkpoints that tell what is asked of them, and keep nothing."""

  def __init__(self, events):
    self.events = events

  def save(self, step, state):
    self.events.append(("saved", step, state.arrays["params/w"].tolist()))

  def wait(self):
    self.events.append("on disk")

  def latest(self):
    self.events.append("latest")


def test_a_run_waits_for_its_last_checkpoint_only():
  first, second = ("saved", 4, [10.0] * 2), ("saved", 8, [36.0] * 2)
  recorded = _Recorded([])
  _loop(None, recorded).run(_state())
  last = ("saved", 10, [55.0] * 2)
  assert recorded.events == [first, second, last, "on disk"]
  stop = iter([None, None, "SIGINT"])
  recorded = _Recorded([])
  with pytest.raises(InterruptedRun) as caught:
    _loop(None, recorded, interrupted=lambda: next(stop)).run(_state())
  assert caught.value.signal == signal.SIGINT
  assert recorded.events == [("saved", 3, [6.0] * 2), "on disk"]


def test_a_signal_at_the_last_step_ends_a_finished_run():
  stop = iter([None] * 9 + ["SIGTERM"])
  recorded = _Recorded([])
  state = _loop(None, recorded, interrupted=lambda: next(stop)).run(_state())
  assert int(state.step) == 10
  assert recorded.events[-2:] == [("saved", 10, [55.0] * 2), "on disk"]


def test_a_loss_that_is_nan_when_a_signal_comes_is_not_saved():
  stop = iter([None, "SIGTERM"])
  recorded = _Recorded([])
  loop = _loop(
    None, recorded, step=_step(nan_at=2), interrupted=lambda: next(stop)
  )
  with pytest.raises(NonFiniteError, match="step 2.*no earlier checkpoint"):
    loop.run(_state())
  # What is still being written counts as soon as it is there.
  assert recorded.events == ["on disk", "latest"]


def test_without_checkpoints_an_error_says_that_none_is_kept(tmp_path):
  with pytest.raises(NonFiniteError, match="no checkpoint is kept"):
    _loop(tmp_path, None, step=_step(nan_at=2)).run(_state())


def test_the_last_step_is_logged_wherever_it_falls(tmp_path):
  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    _loop(tmp_path, None, metrics, steps=7).run(_state())
  records = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
  assert [r["step"] for r in records if r["bits"] == 8] == [5, 7]


def test_examples_per_second_counts_the_examples_since_the_last_entry(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(loop_module.time, "monotonic", lambda: 0.0)
  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    _loop(tmp_path, None, metrics, steps=7).run(_state())
  records = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
  rates = [r["value"] for r in records if r["name"] == "examples_per_second"]
  # Batches of 4, five of them and then two, in the shortest time counted.
  assert rates == [20 / 1e-9, 8 / 1e-9]


class _FourSteps:
  """Losses of a call, which come when it has taken four seconds."""

  def __init__(self, clock, on_arrival=lambda: None):
    self._clock, self._on_arrival = clock, on_arrival

  def __array__(self, dtype=None, copy=None):
    self._clock[0] += 4.0
    self._on_arrival()
    return np.ones((4, 2))


def test_steps_of_a_call_are_taken_to_be_equally_long(tmp_path, monkeypatch):
  clock, updates = [0.0], []
  monkeypatch.setattr(loop_module.time, "monotonic", lambda: clock[0])

  def update(self, step, *, examples, losses):
    updates.append((step, examples))

  def step(state, batches):
    return state._replace(step=state.step + 4), _FourSteps(clock), {}

  monkeypatch.setattr(loop_module.Progress, "update", update)
  options = {"steps": 8, "steps_per_call": 4, "log_every": 2}
  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    _loop(tmp_path, None, metrics, step=step, **options).run(_state())
  records = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
  rates = [r["value"] for r in records if r["name"] == "examples_per_second"]
  # A batch of 4 each second.
  assert rates == [4.0] * 4
  # Speed on the terminal is that between calls.
  assert updates == [(4, 16), (8, 16)]


def test_the_loop_is_one_call_of_many_steps_ahead():
  events = []

  def step(state, batches):
    state = state._replace(step=state.step + 4)
    number = int(state.step)
    events.append(("started", number))
    arrived = lambda: events.append(("waited for", number))  # noqa: E731
    return state, _FourSteps([0.0], arrived), {}

  options = {"steps": 12, "steps_per_call": 4, "checkpoint_every": 100}
  _loop(None, None, step=step, **options).run(_state())
  at = events.index(("waited for", 4))
  assert events[at - 1 : at + 2] == [
    ("started", 8),
    ("waited for", 4),
    ("started", 12),
  ]


def test_a_loop_without_show_progress_prints_nothing(tmp_path, capsys):
  state = _loop(tmp_path, None, steps=6, show_progress=False).run(_state())
  _loop(tmp_path, None, show_progress=False).run(state)
  assert capsys.readouterr() == ("", "")
  _loop(tmp_path, None).run(state)
  assert capsys.readouterr() != ("", "")


class _Scorer:
  """Scores states after steps 3 and 6; the score of `unscored` is not there."""

  def __init__(self, events, unscored=None):
    self.events, self.unscored = events, unscored

  def is_due(self, step):
    return step in (3, 6)

  def resume(self, step, metrics):
    return step == self.unscored

  def score(self, step, state, metrics):
    self.events.append(("scored", step, state.params["w"].tolist()))
    return f"score of {step}"


def test_a_state_is_scored_when_its_checkpoint_is_on_disk(capsys):
  recorded = _Recorded([])
  loop = _loop(None, recorded, steps=6, validation=_Scorer(recorded.events))
  loop.run(_state())
  first, second = [6.0] * 2, [21.0] * 2
  assert recorded.events == [
    *(("saved", 3, first), "on disk", ("scored", 3, first)),
    ("saved", 4, [10.0] * 2),
    *(("saved", 6, second), "on disk", ("scored", 6, second)),
  ]
  assert "score of 6" in capsys.readouterr().err


def test_a_state_whose_score_is_missing_is_scored_before_the_next_step():
  events = []
  stopped = iter([None, None, "SIGTERM"])
  options = {"steps": 5, "interrupted": lambda: next(stopped, None)}
  loop = _loop(None, None, validation=_Scorer(events), **options)
  with pytest.raises(InterruptedRun):
    loop.run(_state())
  assert not events
  resumed = _state()._replace(step=jnp.int32(3))
  _loop(None, None, validation=_Scorer(events, 3), **options).run(resumed)
  assert events == [("scored", 3, [0.0] * 2)]


class _Watched:
  """Batches that tell what became of them."""

  def __init__(self):
    self.events = []

  def stream(self, start):
    try:
      yield from (_Batches()[step] for step in itertools.count(start))
    finally:
      self.events.append("closed")

  def put(self, batch):
    self.events.append(("put", int(batch["label"][0])))
    return jax.device_put(batch)

  def step(self, state, batch):
    assert isinstance(batch["label"], jax.Array)
    self.events.append(("step", int(batch["label"][0])))
    return _step()(state, batch)


def test_the_next_batch_is_transferred_during_a_step(tmp_path):
  watched = _Watched()
  loop = _loop(
    tmp_path, None, batches=watched, put=watched.put, step=watched.step, steps=3
  )
  loop.run(_state())
  assert watched.events == [
    *(("put", 0), ("put", 1), ("step", 0), ("put", 2), ("step", 1)),
    *(("step", 2), "closed"),
  ]


def test_the_stream_is_closed_when_a_run_stops_early(tmp_path):
  watched = _Watched()
  loop = _loop(tmp_path, None, batches=watched, step=_step(nan_at=2))
  with pytest.raises(NonFiniteError):
    loop.run(_state())
  assert watched.events == ["closed"]


def test_a_stream_is_closed_while_references_remain(tmp_path):
  watched = _Watched()
  held = watched.stream(0)
  watched.stream = lambda start: held
  _loop(tmp_path, None, batches=watched).run(_state())
  assert watched.events == ["closed"]


def test_a_resumed_run_reads_from_its_step_on(tmp_path):
  watched = _Watched()
  loop = _loop(tmp_path, None, batches=watched, put=watched.put, steps=9)
  loop.run(_state()._replace(step=jnp.int32(7)))
  assert watched.events == [("put", 7), ("put", 8), "closed"]


class _Pending:
  """Losses on the device: says when they are waited for."""

  def __init__(self, number, events):
    self._number, self._events = number, events

  def __array__(self, dtype=None, copy=None):
    self._events.append(("waited for", self._number))
    return np.array([1.0, 2.0])


def test_logging_every_step_waits_for_no_step_that_was_just_started(tmp_path):
  events = []
  plain = _step()

  def step(state, batch):
    state, *_ = plain(state, batch)
    number = int(state.step)
    events.append(("started", number))
    return state, _Pending(number, events), {}

  with MetricsWriter(tmp_path / "m.jsonl") as metrics:
    _loop(
      tmp_path, None, metrics, step=step, checkpoint_every=100, log_every=1
    ).run(_state())
  assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 10 * 3
  # Four steps are under way whenever the loop looks at a loss.
  for number in range(1, 7):
    at = events.index(("waited for", number))
    assert events[at - 1] == ("started", number + 4)


def test_a_checkpoint_waits_for_no_step_that_was_just_started():
  events, plain = [], _step()

  def step(state, batch):
    state, losses, _ = plain(state, batch)
    events.append(("started", int(state.step)))
    return state, losses, {}

  recorded = _Recorded(events)
  _loop(None, recorded, step=step, checkpoint_every=5).run(_state())
  # Four steps are under way when the fifth is saved: as it was, 1 + ... + 5.
  at = events.index(("saved", 5, [15.0, 15.0]))
  assert events[at - 1] == ("started", 9)
  assert events[-2:] == [("saved", 10, [55.0, 55.0]), "on disk"]


def test_what_copies_need_is_compiled_at_the_first_step(monkeypatch):
  events, plain = [], _step()

  def step(state, batch):
    state, losses, _ = plain(state, batch)
    events.append(("started", int(state.step)))
    return state, losses, {}

  def snapshot(state):
    events.append(("copied", int(state.step)))
    return Snapshot(state)

  monkeypatch.setattr(loop_module, "Snapshot", snapshot)
  _loop(None, _Recorded(events), step=step, steps=3).run(_state())
  assert events[:3] == [("started", 1), ("copied", 1), ("started", 2)]


def test_there_is_one_copy_of_a_state_at_a_time():
  events, plain = [], _step()

  def step(state, batch):
    state, losses, _ = plain(state, batch)
    events.append(int(state.step))
    return state, losses, {}

  recorded = _Recorded(events)
  loop = _loop(None, recorded, step=step, checkpoint_every=1, steps=3)
  loop.run(_state())
  saved = [("saved", 1, [1.0] * 2), ("saved", 2, [3.0] * 2)]
  last = ("saved", 3, [6.0] * 2)
  assert events == [1, 2, saved[0], 3, saved[1], last, "on disk"]


def test_training_continues_while_a_checkpoint_is_written(
  tmp_path, monkeypatch
):
  plain, save, under_way, saved = _step(), Checkpoints.save, [], []
  # Large enough that writing it takes longer than coming to the next step.
  state = _state()._replace(memory={"large": jnp.zeros((4000, 4000))})

  def noted(self, step, snapshot):
    save(self, step, snapshot)
    saved.append(step)

  def step(state, batch):
    if saved:
      under_way.append(not (tmp_path / "c" / str(saved.pop())).exists())
    return plain(state, batch)

  monkeypatch.setattr(Checkpoints, "save", noted)
  with Checkpoints(tmp_path / "c") as checkpoints:
    _loop(tmp_path, checkpoints, step=step, steps=14).run(state)
    assert checkpoints.latest() == 14
  # Of steps 4 and 8; 12 is saved at the end.
  assert len(under_way) == 2 and any(under_way)


def test_an_error_of_something_else_loses_no_checkpoint(tmp_path):
  class Torn:
    def __getitem__(self, step):
      if step == 7:
        raise OSError("torn")
      return _Batches()[step]

  with Checkpoints(tmp_path / "c") as checkpoints:
    loop = _loop(tmp_path, checkpoints, batches=Torn(), checkpoint_every=5)
    with pytest.raises(OSError, match="torn"):
      loop.run(_state())
    assert checkpoints.latest() == 5


def test_a_resumed_stage_reports_its_step(tmp_path, capsys):
  state = _loop(tmp_path, None, steps=6).run(_state())
  assert "resumes" not in capsys.readouterr().err
  _loop(tmp_path, None).run(state)
  assert "joint  resumes from step 6 of 10\n" in capsys.readouterr().err


def test_a_resumed_run_logs_the_losses_of_one_that_was_not_stopped(tmp_path):
  """Stopped at each step in turn, which is seldom one that is logged."""

  def step(state, batch):
    number = batch["label"][0] + 1
    losses = jnp.array([0.1, 0.7], jnp.float32) / number.astype(jnp.float32)
    return state._replace(step=state.step + 1), losses, {}

  def _after(count):
    asked = itertools.count(1)
    return lambda: "SIGTERM" if next(asked) == count else None

  def logged(path, stops):
    state = _state()
    with Checkpoints(path / "c") as checkpoints:
      for stop in (*stops, None):
        with MetricsWriter(path / "m.jsonl") as metrics:
          metrics.resume("joint", int(state.step))
          loop = _loop(
            tmp_path,
            checkpoints,
            metrics,
            step=step,
            interrupted=_after(stop),
          )
          try:
            loop.run(state)
          except InterruptedRun:
            state = checkpoints.restore(like=_state())
    records = map(json.loads, (path / "m.jsonl").read_text().splitlines())
    return [r for r in records if r["name"] == "loss"]

  whole = logged(tmp_path / "whole", ())
  assert [r["step"] for r in whole] == [5, 5, 10, 10]
  for number in range(1, 10):
    assert logged(tmp_path / str(number), (number,)) == whole
  assert logged(tmp_path / "often", (2, 1, 3, 1)) == whole
