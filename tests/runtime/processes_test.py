"""Communication between processes, with the other process faked.

Several real ones are in tests/integration/processes; here is what happens too
seldom there.
"""

import json

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from dr_jax.runtime import processes


@pytest.fixture
def play(monkeypatch):
  """Makes this process one of two; returns what the first one sent."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)

  def as_process(number, received=None):
    sent = []

    def broadcast(content):
      sent.append(content)
      return content if number == 0 else json.dumps(received).encode()

    monkeypatch.setattr(jax, "process_index", lambda: number)
    monkeypatch.setattr(processes, "_broadcast", broadcast)
    return sent

  return as_process


def test_nested_calls_of_the_first_process_broadcast_once(play):
  sent = play(0)
  inner = lambda: processes.on_first(lambda: 3) + 1  # noqa: E731
  assert processes.on_first(inner) == 4
  assert [json.loads(message)["value"] for message in sent] == [4]
  # And the next time it waits for the others again.
  processes.on_first(lambda: None)
  assert len(sent) == 2


def test_an_error_of_the_first_process_is_broadcast_and_the_cause(play):
  class Stopped(RuntimeError):
    signal = 15

  def stops():
    processes.on_first(lambda: None)
    raise Stopped("stopped at step 3")

  sent = play(0)
  with pytest.raises(processes.SharedError, match="^stopped at step") as caught:
    processes.on_first(stops)
  assert isinstance(caught.value.__cause__, Stopped)
  (message,) = map(json.loads, sent)
  assert message["error"] == {
    "message": "stopped at step 3",
    "exit_code": 1,
    "signal": 15,
  }
  processes.on_first(lambda: None)
  assert len(sent) == 2


@pytest.mark.parametrize("number", [None, 15])
def test_other_processes_raise_the_error_of_the_first(play, number):
  error = {"message": "full", "exit_code": 2, "signal": number}
  sent = play(1, {"value": None, "error": error})
  with pytest.raises(processes.SharedError, match="^full$") as caught:
    processes.on_first(lambda: pytest.fail("only the first acts"))
  assert caught.value.signal == number and caught.value.exit_code == 2
  assert sent == [b""]


def test_the_others_have_the_value_that_the_first_process_found(play):
  play(1, {"value": {"a": [1]}, "error": None})
  assert processes.on_first(lambda: pytest.fail("only the first acts")) == {
    "a": [1]
  }


@pytest.mark.parametrize(
  ("mine", "other", "agree"),
  [(True, True, True), (True, False, False), (False, True, False)],
)
def test_processes_agree_if_every_one_does(
  play, monkeypatch, mine, other, agree
):
  play(0)
  monkeypatch.setattr(
    multihost_utils, "process_allgather", lambda x: np.array([x, int(other)])
  )
  assert processes.all_agree(mine) is agree


def test_one_process_agrees_with_itself():
  assert processes.all_agree(True) and not processes.all_agree(False)


def with_others(monkeypatch, highest):
  """The last device is of another process, which sends these numbers."""
  numbers = iter(highest)
  real = jax.make_array_from_process_local_data

  def spread(sharding, mine):
    theirs = mine.copy()
    theirs[-1] = next(numbers)
    return real(sharding, theirs)

  monkeypatch.setattr(jax, "make_array_from_process_local_data", spread)


def test_a_signal_reaches_all_processes_some_calls_later(play, monkeypatch):
  play(0)
  with_others(monkeypatch, [0] * 10)
  received = iter([None, "SIGINT", "SIGINT", *[None] * 7])
  ask = processes.agreed(lambda: next(received), lag=3)
  assert [ask() for _ in range(10)] == [
    *(None, None, None),  # Nothing has arrived.
    *(None, "SIGINT", "SIGINT"),
    *(None, None, None, None),
  ]


@pytest.mark.parametrize(
  ("mine", "theirs", "heard"),
  [
    (None, None, None),
    (None, "SIGINT", "SIGINT"),
    ("SIGINT", None, "SIGINT"),
    ("SIGTERM", "SIGINT", "SIGTERM"),
    ("SIGHUP", None, "SIGHUP"),
    ("SIGHUP", "SIGINT", "SIGHUP"),
    ("SIGHUP", "SIGTERM", "SIGTERM"),
    ("SIGINT", "SIGTERM", "SIGTERM"),
  ],
)
def test_of_two_signals_all_processes_receive_sigterm(
  play, monkeypatch, mine, theirs, heard
):
  play(0)
  order = [None, "SIGINT", "SIGHUP", "SIGTERM"]
  with_others(monkeypatch, [order.index(theirs)])
  assert processes.agreed(lambda: mine, lag=0)() == heard


def test_an_unreachable_coordinator_is_one_line(monkeypatch):
  def fails(**options):
    raise RuntimeError("DEADLINE_EXCEEDED:\n  no one there")

  for name, value in zip(
    processes._VARIABLES, ("127.0.0.1:1", "2", "1"), strict=True
  ):
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, "initialize", fails)
  message = (
    "^could not connect to the coordinator: DEADLINE_EXCEEDED: no one there$"
  )
  with pytest.raises(ValueError, match=message):
    processes.initialize()


def test_a_cluster_is_asked_only_if_wanted(monkeypatch):
  asked = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **options: asked.append(options)
  )
  for name in processes._VARIABLES:
    monkeypatch.delenv(name, raising=False)
  assert not processes.initialize()
  assert asked == []
  assert not processes.initialize(detect=True)
  (options,) = asked
  assert "coordinator_address" not in options
  # Before a minute is over the others know that one has died.
  assert options["heartbeat_timeout_seconds"] < 60


@pytest.mark.parametrize(
  ("environment", "message"),
  [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS must be set"),
    (
      {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "2",
      },
      "JAX_PROCESS_ID must be in 0..1, .* got 2",
    ),
    (
      {
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
        "JAX_NUM_PROCESSES": "two",
        "JAX_PROCESS_ID": "0",
      },
      "JAX_NUM_PROCESSES must be an integer >= 0, got 'two'",
    ),
  ],
)
def test_incomplete_variables_are_named(monkeypatch, environment, message):
  for name in processes._VARIABLES:
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message):
    processes.initialize()


def test_one_process_asks_no_other(monkeypatch):
  for name in processes._VARIABLES:
    monkeypatch.delenv(name, raising=False)
  assert not processes.initialize()
  assert processes.is_first()
  assert processes.on_first(lambda: 3) == 3
  assert processes.gathered([3]) == [[3]]
  stop = iter([None, "SIGTERM"])
  ask = processes.agreed(lambda: next(stop))
  assert [ask(), ask()] == [None, "SIGTERM"]
