"""Stage search: allocations of bits under budgets, scored by inference.

arXiv 2502.01199, section 3.3. Every search at every budget has a file of its
own, whose name depends on all that decides its result, so that the same
directory can take other searches later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dr_jax import allocate, nn, report, train
from dr_jax import search as searches
from dr_jax.config import ConfigError
from dr_jax.pipeline import scoring
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages import search_space
from dr_jax.pipeline.stages.hessian import traces
from dr_jax.pipeline.stages.stage import Stage
from dr_jax.pipeline.stages.supernet import supernet
from dr_jax.pipeline.work import FORWARD, GRADIENT, Work
from dr_jax.pipeline.workdir import read_object
from dr_jax.report.results import ROW
from dr_jax.runtime.files import write_json

Row = dict[str, Any]


def check(run: RunContext) -> None:
  """Checks budgets and options before anything is trained for them.

  Raises:
    ConfigError: naming the field.
  """
  config = run.config.search
  problem = search_space.problem(config, _table_by_shapes(run), run.bits)
  for budget in config.budgets:
    try:
      problem.check(search_space.budgets(problem, config.costs, budget))
    except ValueError as error:
      raise ConfigError(f"search.budgets={budget!r}: {error}") from None


def _table_by_shapes(run):
  """The table of the layers that will be quantized: it depends on shapes."""
  network = nn.quantize(run.zeros(), weight=run.weight, sample=run.sample[:1])
  return nn.layer_table(network)


def search(run: RunContext) -> None:
  """Searches under every budget; writes what each search found."""
  config = run.config.search
  started = time.monotonic()
  study = _study(run)
  problem = study.problem
  rows = []
  for budget in config.budgets:
    budgets = search_space.budgets(problem, config.costs, budget)
    for strategy in config.strategies:
      path = _path(run, problem, strategy, budget, budgets)
      if not path.exists():
        run.stop_if_asked(STAGE.name)
        found = _search(run, study, strategy, budgets)
        test = study.score_on_test(found.allocation)
        write_json(path, _row(strategy, budget, budgets, found, test))
      rows.append(read_object(path, ROW))
  directory = run.workdir.path / STAGE.name
  write_json(
    directory / "pareto.json", report.search_summary(rows, run.data.task)
  )
  # The result last: a stage with a result is not looked at again.
  run.workdir.finish(STAGE.name, started, request=_request(run), rows=rows)
  # Of searches by gradient, whose results are there now.
  shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def is_done(run: RunContext) -> bool:
  """Whether the result there is that of the same request."""
  done = run.workdir.result(STAGE.name)
  return done is not None and done.get("request") == _request(run)


def found_allocations(run: RunContext) -> dict[str, Row]:
  """What the searches found: {"<strategy>_<budget>": row}."""
  found = run.workdir.result(STAGE.name) or {"rows": []}
  return {f"{r['strategy']}_{r['budget']:g}": r for r in found["rows"]}


class _Study(NamedTuple):
  """What the searches of a run are given.

  Attributes:
    problem: layers, costs, ties and pins.
    evaluate: scores assignments on `search.eval_split`.
    inputs: what only some searches take, by the name of their argument.
    score_on_test: scores an allocation on the test set.
  """

  problem: searches.Problem
  evaluate: searches.Evaluator
  inputs: dict[str, Any]
  score_on_test: Callable[[allocate.Allocation], train.Score]


def _study(run):
  config = run.config.search
  network = supernet(run)
  table = nn.layer_table(network)
  deployed = nn.functional(scoring.as_deployed(run, network))
  evaluate = train.make_evaluate(deployed, run.local)
  eval_batches = _eval_batches(run)

  def score(index, batches):
    return evaluate(deployed.params, deployed.batch_stats, index, batches)

  def score_on_test(allocation):
    return score(allocation.index(run.bits), run.epoch(run.data.test))

  fingerprint = run.workdir.finished("supernet")["network"][:8]
  directory = run.workdir.path / STAGE.name
  return _Study(
    problem=search_space.problem(config, table, run.bits),
    evaluate=searches.Evaluator(
      lambda index: score(index, eval_batches),
      path=directory / f"trials_{config.eval_split}_{fingerprint}.jsonl",
      interrupted=run.interrupted,
    ),
    inputs={
      "sensitivity": _sensitivity(run, network, table),
      "supernet": _trainable(run, network, directory / "checkpoints"),
    },
    score_on_test=score_on_test,
  )


def _sensitivity(run, network, table):
  estimates = traces(run)
  return searches.sensitivity_tables(
    [estimates[row.name].mean for row in table],
    [row.parameters for row in table],
    run.bits,
    searches.quantization_errors(network),
  )


def _trainable(run, network, directory):
  split = nn.functional(network)
  return searches.SuperNet(
    network=split,
    params=split.params,
    batch_stats=split.batch_stats,
    batches=run.batches(),
    # Checkpoints are written by all processes together; here is one alone.
    directory=directory if jax.process_count() == 1 else None,
    interrupted=run.interrupted,
  )


def _search(run, study, strategy, budgets):
  options = run.config.search.options.get(strategy, {})
  inputs = [study.inputs[name] for name in searches.inputs_of(strategy)]
  try:
    return searches.SEARCHES[strategy](
      study.problem,
      budgets,
      study.evaluate,
      *inputs,
      seed=run.config.seed,
      **options,
    )
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f"search: {strategy} with options {options} under {budgets}: {error}"
    ) from error


def _eval_sources(run):
  """The images that assignments are scored on."""
  sources = {"train": run.data.train, "held_out": run.held_out}
  split = run.config.search.eval_split
  return [*sources.values()] if split == "both" else [sources[split]]


def _eval_batches(run):
  """Batches of the images that assignments are scored on."""
  used = _eval_sources(run)
  size = min(512, *(len(source) for source in used))
  return [
    batch for source in used for batch in run.epoch(source, batch_size=size)
  ]


def _path(run, problem, strategy, budget, budgets) -> pathlib.Path:
  """The file of one search; its name depends on all that decides its result."""
  config = run.config.search
  decides = {
    "network": run.workdir.finished("supernet")["network"],
    "costs": {n: problem.costs[n].tolist() for n in config.costs},
    "budgets": budgets,
    "options": config.options.get(strategy, {}),
    "eval_split": config.eval_split,
    "metric": config.metric,
    "ties": config.ties,
    "pinned": config.pinned,
  }
  digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
  name = f"{strategy}_{budget:g}_{digest.hexdigest()[:8]}.json"
  return run.workdir.path / STAGE.name / "found" / name


def _request(run):
  """What decides the stage's result; what was trained stays as it is."""
  config = run.config.search
  request = {
    **dataclasses.asdict(config),
    "latency": search_space.latency_table(config.latency)
    if config.latency
    else None,
    "network": (run.workdir.result("supernet") or {}).get("network"),
  }
  return json.loads(json.dumps(request))


def _row(strategy, budget, budgets, found, test) -> Row:
  return {
    "strategy": strategy,
    "budget": budget,
    "budgets": budgets,
    "allocation": dict(found.allocation),
    "eval": {"accuracy": found.accuracy, "loss": found.loss},
    "test": test._asdict(),
    "cost": found.cost,
    "evaluations": found.evaluations,
    "seconds": round(found.seconds, 3),
    "evaluation_seconds": round(found.evaluation_seconds, 3),
  }


def _work(run, table):
  """The searches, each under every budget, and scores of what they find."""
  config = run.config.search
  problem = search_space.problem(config, table, run.bits)
  images = sum(map(len, _eval_sources(run)))
  work = []
  for strategy in config.strategies:
    options = config.options.get(strategy, {})
    name = f"{STAGE.name}/{strategy}"
    counts = [
      searches.counts(
        searches.SEARCHES[strategy],
        problem,
        search_space.budgets(problem, config.costs, budget),
        options,
      )
      for budget in config.budgets
    ]
    steps = sum(count.steps for count in counts)
    if steps:
      batch = run.config.data.batch_size
      work.append(Work(name, "steps", steps, steps, batch, GRADIENT))
    most = sum(count.evaluations for count in counts)
    # What one search has scored, no other scores again.
    work.append(Work(name, "evaluations", 1, most, images, FORWARD))
  searched = len(config.strategies) * len(config.budgets)
  tests = len(run.data.test)
  return [*work, Work(STAGE.name, "tests", searched, searched, tests, FORWARD)]


STAGE = Stage(
  name="search",
  help="search for allocations of bits under budgets",
  run=search,
  needs=("supernet",),
  work=_work,
  single_process=True,
  check=check,
  is_done=is_done,
)
