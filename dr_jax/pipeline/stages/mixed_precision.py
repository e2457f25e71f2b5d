"""The stages of a run that give every layer bits of its own.

  hessian   traces of the float network's Hessian, one per quantized layer
  supernet  the multi-precision network, trained further by HASB
  search    allocations under budgets, judged by inference

arXiv 2502.01199, section 3.3. Each takes the run whose stage it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import shutil
import time
import warnings
from typing import Any

import jax

from dr_jax import data, hessian, nn, report, train
from dr_jax import search as searches
from dr_jax.config import ConfigError
from dr_jax.pipeline.context import Run
from dr_jax.pipeline.stages import search_space
from dr_jax.pipeline.workdir import read_json, write_json
from dr_jax.runtime import compilation
from dr_jax.runtime.processes import on_first


def check(run: Run) -> None:
  """Checks what a search is told, before anything is trained for it.

  Raises:
    ConfigError: naming the field.
  """
  wanted = run.config.search
  network = run.quantize(run.untrained(), run.config.quant)
  problem = search_space.problem(wanted, nn.layer_table(network), run.bits)
  for budget in wanted.budgets:
    try:
      problem.check(search_space.budgets(problem, wanted.costs, budget))
    except ValueError as error:
      raise ConfigError(f"search.budgets={budget!r}: {error}") from None
  for strategy, options in wanted.options.items():
    known = inspect.signature(searches.SEARCHES[strategy]).parameters
    allowed = [n for n in known if n not in ("problem", "budgets", "seed")]
    for option in options:
      if option not in allowed:
        raise ConfigError(
          f"search.options.{strategy}.{option}: unknown; allowed are "
          f"{', '.join(allowed) or 'no options'}"
        )


def traces(run) -> dict[str, hessian.TraceEstimate]:
  """Traces by layer name: estimated, or read where the stage is done.

  Raises:
    ValueError: if the file is damaged, or of another float network.
  """
  network = nn.functional(run.float_network())
  fingerprint = hessian.fingerprint((network.params, network.batch_stats))
  path = run.workdir.path / "hessian" / "traces.json"
  layers = [row.name for row in nn.layer_table(run.multi_precision_network())]
  if path.exists() and run.workdir.result("hessian") is not None:
    estimates = hessian.load(path, fingerprint=fingerprint)
    if list(estimates) != layers:
      raise ConfigError(
        f"{path}: traces of layers {list(estimates)}; allowed are {layers}"
      )
    return estimates
  started = time.monotonic()
  config = run.config.hessian

  def loss(state, batch):
    logits, _ = network.apply(
      state["params"], state["batch_stats"], 0, batch["image"]
    )
    return train.cross_entropy(logits, batch["label"])

  prefix, suffix = "params/", "/kernel"
  count = min(config.images, len(run.data.train))
  images = data.batches(run.data.train, batch_size=count, seed=run.config.seed)[
    0
  ]
  estimates = hessian.trace(
    loss,
    {"params": network.params, "batch_stats": network.batch_stats},
    jax.random.key(run.config.seed),
    [
      run.spread(
        {
          name: array[start : start + config.batch_size]
          for name, array in images.items()
        }
      )
      for start in range(0, count, config.batch_size)
    ],
    select=[f"{prefix}{name}{suffix}" for name in layers],
    rel_stderr=config.rel_stderr,
    min_probes=config.min_probes,
    max_probes=config.max_probes,
    jit=compilation.jit,
    on_probe=lambda *_: run.stop_if_asked("hessian"),
  )
  estimates = {name: estimates[f"{prefix}{name}{suffix}"] for name in layers}
  loose = [
    f"{name} ({e.mean:.3g} +- {e.stderr:.2g})"
    for name, e in estimates.items()
    if e.stderr > config.rel_stderr * abs(e.mean)
  ]
  if loose:
    warnings.warn(
      f"hessian: after max_probes={config.max_probes} the relative standard "
      f"error is above rel_stderr={config.rel_stderr:g} at {', '.join(loose)}",
      stacklevel=2,
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  hessian.save(path, estimates, fingerprint=fingerprint)
  run.workdir.finish(
    "hessian",
    started,
    traces={name: e._asdict() for name, e in estimates.items()},
    sensitivity=_sensitivity(run, estimates),
  )
  return estimates


def _sensitivity(run, estimates):
  table = nn.layer_table(run.multi_precision_network())
  parameters = {row.name: row.parameters for row in table}
  return hessian.sensitivity(estimates, parameters)


def supernet(run):
  """The SuperNet, trained; restored if its stage is done."""
  if "supernet" in run.trained:
    return run.trained["supernet"]
  run.float_network()
  network = nn.requantize(run.multi_precision_network(), norm="transitional")
  # One process reads or estimates traces: all must draw the same bits.
  sensitivity = on_first(lambda: _sensitivity(run, traces(run)))
  started = time.monotonic()
  recipe, switching = run.config.supernet, run.config.hasb
  steps = run.train(
    "supernet",
    network,
    run.bits,
    recipe,
    sampling=lambda steps: train.hasb.sampling(
      [sensitivity[row.name] for row in nn.layer_table(network)],
      run.bits,
      steps=steps,
      epochs=recipe.epochs,
      start=switching.sigma,
      warmup=switching.warmup,
    ),
  )
  split = nn.functional(network)
  run.score(
    "supernet",
    network,
    run.bits,
    steps,
    started,
    network=hessian.fingerprint((split.params, split.batch_stats)),
  )
  run.trained["supernet"] = network
  return network


def search(run) -> None:
  """Searches under every budget; writes what each search found.

  The same directory takes other searches later: what was trained and what was
  scored stays.
  """
  config = run.config.search
  request = _request(run)
  done = run.workdir.result("search")
  if done is not None and done.get("request") == request:
    return
  started = time.monotonic()
  problem, scored = _problem(run)
  rows = []
  for budget in config.budgets:
    budgets = search_space.budgets(problem, config.costs, budget)
    for strategy in config.strategies:
      options = config.options.get(strategy, {})
      path = _place(run, problem, strategy, budget, budgets)
      if not path.exists():
        run.stop_if_asked("search")
        found = _found(problem, strategy, budgets, run.config.seed, options)
        test = scored(found.allocation)
        write_json(path, _row(strategy, budget, budgets, found, test))
      rows.append(read_json(path))
  # The result last: a stage with a result is not looked at again.
  write_json(run.workdir.path / "search" / "pareto.json", report.pareto(rows))
  run.workdir.finish("search", started, request=request, rows=rows)
  # Of searches by gradient, whose results are there now.
  shutil.rmtree(run.workdir.path / "search" / "checkpoints", ignore_errors=True)


def allocations(run) -> dict[str, dict[str, Any]]:
  """What the searches found: {"<strategy>_<budget>": row}."""
  found = run.workdir.result("search") or {"rows": []}
  return {f"{r['strategy']}_{r['budget']:g}": r for r in found["rows"]}


def _problem(run):
  """The problem of this run, and what scores an allocation on test."""
  config = run.config.search
  network = supernet(run)
  table = nn.layer_table(network)
  served = nn.functional(run.served(network))
  evaluate = train.make_evaluate(served, run.local)
  judges = _judges(run)

  def score(index, batches):
    return evaluate(served.params, served.batch_stats, index, batches)

  estimates = traces(run)
  trainable = nn.functional(network)
  of_network = run.workdir.result("supernet")["network"][:8]
  directory = run.workdir.path / "search"
  problem = dataclasses.replace(
    search_space.problem(config, table, run.bits),
    evaluate=searches.Evaluator(
      lambda index: score(index, judges),
      path=directory / f"trials_{config.judge}_{of_network}.jsonl",
    ),
    sensitivity=searches.sensitivity_tables(
      [estimates[row.name].mean for row in table],
      [row.parameters for row in table],
      run.bits,
      searches.quantization_errors(network),
    ),
    network=trainable,
    state=(trainable.params, trainable.batch_stats),
    batches=run.batches(run.config.seed),
    # Checkpoints are written by all processes together; here is one alone.
    directory=directory / "checkpoints" if jax.process_count() == 1 else None,
    interrupted=run.interrupted,
  )

  def on_test(allocation):
    return score(allocation.index(run.bits), run.epoch(run.data.test))

  return problem, on_test


def _found(problem, strategy, budgets, seed, options):
  try:
    return searches.SEARCHES[strategy](problem, budgets, seed=seed, **options)
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f"search: {strategy} with options {options} under {budgets}: {error}"
    ) from error


def _judges(run):
  """Batches of the images that assignments are scored on."""
  sources = {"train": run.data.train, "held_out": run.held_out}
  judge = run.config.search.judge
  used = sources.values() if judge == "both" else [sources[judge]]
  size = min(512, *(len(source) for source in used))
  return [
    batch for source in used for batch in run.epoch(source, batch_size=size)
  ]


def _place(run, problem, strategy, budget, budgets):
  """Where the result of one search lies: its name says all that decides it."""
  config = run.config.search
  decides = {
    "network": run.workdir.result("supernet")["network"],
    "costs": {n: problem.costs[n].tolist() for n in config.costs},
    "budgets": budgets,
    "options": config.options.get(strategy, {}),
    "judge": config.judge,
    "prefer": config.prefer,
    "ties": config.ties,
    "pinned": config.pinned,
  }
  digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
  name = f"{strategy}_{budget:g}_{digest.hexdigest()[:8]}.json"
  return run.workdir.path / "search" / "found" / name


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


def _row(strategy, budget, budgets, found, test):
  return {
    "strategy": strategy,
    "budget": budget,
    "budgets": budgets,
    "allocation": dict(found.allocation),
    "judged": {"accuracy": found.accuracy, "loss": found.loss},
    "test": test._asdict(),
    "cost": found.cost,
    "evaluations": found.evaluations,
    "seconds": round(found.seconds, 3),
    "evaluation_seconds": round(found.evaluation_seconds, 3),
  }
