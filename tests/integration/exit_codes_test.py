"""How the command ends, in this process: exit codes and messages.

Real processes and real signals are in command_test, kills_test, processes/.
"""

import os
import signal
import sys
import time
import types
import warnings

import jax
import pytest
from ml_collections import ConfigDict

from dr_jax import main
from dr_jax.checkpoint.checkpoints import CheckpointError
from dr_jax.runtime.processes import SharedError
from dr_jax.train import InterruptedRun, NonFiniteError


@pytest.fixture
def in_process(monkeypatch):
  """Runs `main` here, with a run that raises; returns the exit code."""

  def run(raised, preempted=0):
    def raises(values):
      raise raised

    config = types.SimpleNamespace(value=ConfigDict())
    monkeypatch.setattr(main, "_CONFIG", config)
    code = types.SimpleNamespace(value=preempted)
    monkeypatch.setattr(main, "_PREEMPTED", code)
    no = types.SimpleNamespace(value=False)
    monkeypatch.setattr(main, "_DISTRIBUTED", no)
    monkeypatch.setattr(main, "_DRY_RUN", no)
    monkeypatch.setattr(main, "_run", raises)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    return main.main(["main"])

  return run


@pytest.mark.parametrize(
  ("raised", "preempted", "code"),
  [
    (InterruptedRun("SIGTERM at step 3", "SIGTERM"), 0, 0),
    (InterruptedRun("SIGTERM at step 3", "SIGTERM"), 143, 143),
    (InterruptedRun("SIGHUP at step 3", "SIGHUP"), 0, 0),
    (InterruptedRun("SIGHUP at step 3", "SIGHUP"), 143, 143),
    (InterruptedRun("SIGINT at step 3", "SIGINT"), 0, 130),
    (CheckpointError("a checkpoint could\n not be saved"), 0, 2),
    (OSError("No space left"), 0, 2),
    (NonFiniteError("loss is nan"), 0, 1),
    (SharedError("No space left", 2, None), 0, 2),
    (SharedError("SIGTERM at step 3", 1, signal.SIGTERM), 0, 0),
    (SharedError("SIGTERM at step 3", 1, signal.SIGTERM), 75, 75),
    (SharedError("SIGINT at step 3", 1, signal.SIGINT), 75, 130),
  ],
)
def test_every_end_of_a_run_is_one_line_and_an_exit_code(
  in_process, capsys, raised, preempted, code
):
  assert in_process(raised, preempted) == code
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1
  assert " ".join(str(raised).split()) in err


@pytest.fixture
def as_process_of_two(monkeypatch):
  """Makes this process one of two; returns the codes it left at once with."""
  left = []

  def as_process(number):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    # All who meet the same error need the first one to say so.
    monkeypatch.setattr(time, "sleep", lambda s: left.append("waited"))
    monkeypatch.setattr(os, "_exit", left.append)
    return left

  return as_process


@pytest.mark.parametrize(
  ("number", "raised", "code", "left"),
  [
    (0, ValueError("mine"), 2, ["waited", 2]),
    (1, ValueError("mine"), 2, [2]),
    (0, SharedError("ours", 2, None), 2, []),
    (1, SharedError("ours", 2, None), 2, []),
    (1, NonFiniteError("loss is nan"), 1, []),
    (1, InterruptedRun("SIGTERM at step 3", "SIGTERM"), 0, []),
    (1, jax.errors.JaxRuntimeError("Gloo: reset"), 3, [3]),
  ],
)
def test_an_error_of_one_process_alone_ends_it_without_the_shutdown_barrier(
  in_process, as_process_of_two, capsys, number, raised, code, left
):
  seen = as_process_of_two(number)
  assert in_process(raised) == code
  assert seen == left
  assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
  ("raised", "message", "code"),
  [
    ("UNAVAILABLE: x", "error: another process has ended, or cannot be rea", 3),
    ("INTERNAL: x", "error: INTERNAL: x\n", 1),
  ],
)
def test_a_lost_connection_is_reported_as_a_lost_process(
  in_process, as_process_of_two, capsys, raised, message, code
):
  as_process_of_two(1)
  assert in_process(jax.errors.JaxRuntimeError(raised)) == code
  assert capsys.readouterr().err.startswith(message)


def test_an_unexpected_error_of_one_process_prints_its_traceback(
  in_process, as_process_of_two, capsys
):
  seen = as_process_of_two(1)
  assert in_process(AttributeError("nobody")) == 1
  assert seen == [1]
  assert "AttributeError: nobody" in capsys.readouterr().err


def test_an_error_of_the_compiler_has_its_traceback(in_process):
  with pytest.raises(jax.errors.JaxRuntimeError):
    in_process(jax.errors.JaxRuntimeError("UNAVAILABLE: x"))


def test_only_the_first_process_shows_the_results(
  in_process, as_process_of_two, capsys, monkeypatch
):
  # Calling `in_process` has set all else; now the run ends well.
  in_process(NonFiniteError("loss is nan"))
  wide = "a table" * 20
  monkeypatch.setattr(main, "_run", lambda values: ([wide], "runs/x"))
  capsys.readouterr()
  as_process_of_two(1)
  assert main.main(["main"]) == 0
  assert capsys.readouterr() == ("", "")
  as_process_of_two(0)
  assert main.main(["main"]) == 0
  assert capsys.readouterr() == (f"{wide}\nworkdir: runs/x\n", "")


def test_unknown_arguments_and_a_missing_configuration_are_named(
  in_process, capsys, monkeypatch
):
  in_process(NonFiniteError("loss is nan"))
  capsys.readouterr()
  assert main.main(["main", "digits"]) == 2
  assert capsys.readouterr().err == (
    "error: arguments must be flags, --name=value, got 'digits'\n"
  )
  monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=None))
  assert main.main(["main"]) == 2
  assert (
    "error: --config must name a configuration file" in capsys.readouterr().err
  )


def test_a_comparison_takes_one_process(as_process_of_two, monkeypatch):
  monkeypatch.setattr(main.compilation, "cache_on_disk", lambda: None)
  as_process_of_two(0)
  with pytest.raises(ValueError, match="methods: a comparison must run in one"):
    main._run({"methods": ("adabits",)})


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("profile", 3, "profile must be 0 with a comparison, got 3"),
    ("log_to", ["wandb"], r"log_to must be \[\] with a comparison, got \['w"),
  ],
)
def test_a_comparison_is_neither_profiled_nor_logged(
  monkeypatch, name, value, message
):
  monkeypatch.setattr(main.compilation, "cache_on_disk", lambda: None)
  given = {"profile": 0, "log_to": [], name: value}
  for flag, its in given.items():
    flag_of = types.SimpleNamespace(name=flag, value=its)
    monkeypatch.setattr(main, f"_{flag.upper()}", flag_of)
  with pytest.raises(ValueError, match=message):
    main._run({"methods": ("adabits",)})


@pytest.mark.parametrize(
  ("given", "workdir"), [(None, "runs/mine"), ("there", "there")]
)
def test_the_default_workdir_is_runs_and_the_name(monkeypatch, given, workdir):
  def run(config, workdir, interrupted, profile, sinks):
    assert (profile, sinks) == (3, [])
    task = "classification"
    return {"name": config.name, "task": task, "bits": (), "stages": {}}

  monkeypatch.setattr(main.compilation, "cache_on_disk", lambda: None)
  monkeypatch.setattr(main.pipeline, "run", run)
  monkeypatch.setattr(main, "_on_signals", lambda: None)
  monkeypatch.setattr(main, "_WORKDIR", types.SimpleNamespace(value=given))
  monkeypatch.setattr(main, "_PROFILE", types.SimpleNamespace(value=3))
  monkeypatch.setattr(main, "_LOG_TO", types.SimpleNamespace(value=[]))
  assert main._run({"name": "mine"})[1] == workdir


def test_an_error_without_a_message_is_reported_by_its_type(in_process, capsys):
  assert in_process(OSError()) == 2
  assert capsys.readouterr().err == "error: OSError\n"


def test_abandoned_writes_are_silent_and_other_unraisable_errors_are_not(
  in_process, capsys
):
  assert in_process(OSError("No space left")) == 2
  capsys.readouterr()

  class Raises:
    def __init__(self, text):
      self.text = text

    def __del__(self):
      raise RuntimeError(self.text)

  Raises("Event loop is closed")
  assert capsys.readouterr().err == ""
  Raises("something else")
  assert "RuntimeError: something else" in capsys.readouterr().err


def test_a_second_ctrl_c_does_not_wait_but_a_second_sigterm_does(
  monkeypatch, capfd
):
  class Left(BaseException):
    """In the place of the end of this process."""

  def leave(code):
    raise Left(code)

  monkeypatch.setattr(os, "_exit", leave)
  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = {n: signal.getsignal(n) for n in numbers}
  try:
    # As nohup starts a process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    received = main._on_signals()
    signal.raise_signal(signal.SIGHUP)
    assert received() is None
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert received() == "SIGTERM"
    with pytest.raises(Left, match="130"):
      signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == (
      "stopped at once; rerun the same command to resume\n"
    )
    # Once a signal is named, the answer stays.
    received = main._on_signals()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert received() == "SIGINT"
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@pytest.fixture
def standard_output(monkeypatch):
  """Puts another stream in the place of standard output."""
  opened = []

  def put(path, **options):
    opened.append(open(path, "w", **options))
    monkeypatch.setattr(sys, "stdout", opened[-1])

  yield put
  for file in opened:
    file.close()


def test_a_full_device_for_the_results_is_one_line(standard_output, capsys):
  standard_output("/dev/full")
  assert main._show(["a table"], "runs/x") == 2
  assert capsys.readouterr().err == (
    "error: standard output: No space left on device; see runs/x\n"
  )


def test_results_that_nobody_reads_any_more_have_a_code(
  standard_output, tmp_path, capsys
):
  os.mkfifo(tmp_path / "pipe")
  reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
  standard_output(tmp_path / "pipe")
  os.close(reader)
  assert main._show(["a table"], "runs/x") == 128 + signal.SIGPIPE
  assert capsys.readouterr().err == ""


def test_results_without_a_standard_output_are_not_shown(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  assert main._show(["a table"], "runs/x") == 0


def test_an_encoding_without_a_sign_shows_another(standard_output, tmp_path):
  standard_output(tmp_path / "out", encoding="ascii")
  assert main._show(["90.00 ± 0.10"], "runs/x") == 0
  text = (tmp_path / "out").read_text(encoding="ascii")
  assert text == "90.00 ? 0.10\nworkdir: runs/x\n"


@pytest.fixture
def asked(monkeypatch, capsys):
  """Asks for help with a configuration; returns the code and what is shown."""
  monkeypatch.setenv("COLUMNS", "60")

  def ask(values, *argv):
    config = types.SimpleNamespace(value=values and ConfigDict(values))
    monkeypatch.setattr(main, "_CONFIG", config)
    monkeypatch.setattr(main.config_flags, "parse", lambda argv: argv)
    with pytest.raises(SystemExit) as ended:
      main._parse(["main", *argv])
    return ended.value.code, *capsys.readouterr()

  return ask


def test_help_shows_the_stages_and_the_fields_of_a_configuration(asked):
  values = {"train": {"epochs": 3}}
  code, out, err = asked(values, "--config=x.py", "--help", "--workdir=y")
  assert (code, err) == (0, "")
  for stage in main.STAGES.values():
    assert f"\n  {stage.name}  " in out
    assert stage.help in " ".join(out.split())
  assert "\n--config.train.epochs=3\n    Passes over the training set." in out
  assert max(map(len, out.splitlines())) <= 60


def test_help_of_a_configuration_that_is_not_valid_says_why(asked):
  code, out, _ = asked({"train": {"epochs": -3}}, "--help")
  assert code == 0
  assert "not valid: train.epochs must be >= 0, got -3" in out
  assert "\n--config.train.epochs=-3\n" in out
  code, out, _ = asked({"methods": {}, "seeds": (0,)}, "--help")
  assert "not valid: methods must be {name: fields}, at least one" in out


def test_help_without_a_configuration_shows_flags_and_stages(asked):
  code, out, err = asked(None, "--help")
  assert (code, err) == (0, "")
  assert "\n  pretrain         train the float network\n" in out
  assert "--config.train" not in out and "With --config=FILE" in out


def test_help_behind_the_end_of_flags_is_an_argument(monkeypatch):
  monkeypatch.setattr(main.config_flags, "parse", lambda argv: argv)
  argv = ["main", "--", "--help"]
  assert main._parse(argv) == argv


@pytest.mark.parametrize(
  ("values", "name"),
  [({"name": "mine"}, "describe"), ({"methods": {}}, "describe_comparison")],
)
def test_a_dry_run_is_printed_and_runs_nothing(
  in_process, capsys, monkeypatch, values, name
):
  # Calling `in_process` has set all else.
  in_process(NonFiniteError("loss is nan"))
  capsys.readouterr()
  base = types.SimpleNamespace(name="mine")
  compared = types.SimpleNamespace(base=base)
  monkeypatch.setattr(main.comparison, "from_values", lambda values: compared)
  monkeypatch.setattr(
    main.dry_run, name, lambda config, workdir: f"would run in {workdir}"
  )
  nothing = types.SimpleNamespace(value=None)
  monkeypatch.setattr(main, "_WORKDIR", nothing)
  monkeypatch.setattr(main, "_DRY_RUN", types.SimpleNamespace(value=True))
  config = types.SimpleNamespace(value=ConfigDict(values))
  monkeypatch.setattr(main, "_CONFIG", config)
  assert main.main(["main"]) == 0
  assert capsys.readouterr() == ("would run in runs/mine\n", "")


def test_a_dry_run_of_a_wrong_configuration_is_one_line(
  in_process, capsys, monkeypatch
):
  in_process(NonFiniteError("loss is nan"))
  capsys.readouterr()
  monkeypatch.setattr(main, "_DRY_RUN", types.SimpleNamespace(value=True))
  wrong = ConfigDict({"train": {"epochs": -3}})
  monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=wrong))
  assert main.main(["main"]) == 2
  assert capsys.readouterr() == (
    "",
    "error: train.epochs must be >= 0, got -3\n",
  )
