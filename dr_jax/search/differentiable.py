"""Search by gradient: probabilities of bit-widths, trained with the weights.

Every group of tied layers g has logits a_g over the B candidates. The network
computes with mixtures: what a weight, an input, a norm's row would be at each
candidate, averaged by probabilities m_lb. One batch takes one step on

  CE(batch; weights, m) + strength * max(0, E / budget - 1)
  E = sum_l sum_b m_lb cost_lb, the expected cost

  edmips  m = softmax(a); weights and logits learn from the same batches.
          CVPR 2020, arXiv 2004.05795.
  dnas    m = softmax((a + Gumbel noise) / T), resampled for every batch, T
          falling; weights learn from even batches and logits from odd ones.
          arXiv 1812.00090.

The papers price all of E, budget or not, and try strengths until the result
is cheap enough; a price on what exceeds the budget aims at it. What is found
is the most probable assignment within the budgets. Weights change in a copy:
the assignment is scored on the SuperNet as it was, without retraining, as in
all other searches.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.quant import SCALE_MAX, SCALE_MIN
from dr_jax.runtime import tree
from dr_jax.runtime.compilation import jit
from dr_jax.search.problem import Index, Ledger, Problem, Result
from dr_jax.train import Loop, TrainState, cross_entropy, make_optimizer


class Knobs(NamedTuple):
  """Arguments of a step, so that one program serves all searches.

  Attributes:
    rows: int32 [L], where each layer finds its probabilities: the number of
      its group, or, pinned, the number of groups plus its position.
    shares: float32 [budgets, L, B], costs over their budgets.
    strength: float32, what exceeding a budget by all of it costs, in nats.
    learning_rate, logit_learning_rate: float32, of Adam.
    hot, cold: float32, temperature at the first and the last step.
    steps: float32, length of the search.
    noise: float32, 1 to draw probabilities, 0 to take them as they are.
    alternate: bool, weights and logits learn from separate batches.
  """

  rows: Any
  shares: Any
  strength: Any
  learning_rate: Any
  logit_learning_rate: Any
  hot: Any
  cold: Any
  steps: Any
  noise: Any
  alternate: Any


def edmips(
  problem: Problem,
  budgets: Mapping[str, int],
  *,
  seed: int = 0,
  steps: int = 200,
  learning_rate: float = 1e-3,
  logit_learning_rate: float = 0.05,
  strength: float = 0.3,
  checkpoint_every: int = 50,
) -> Result:
  """Searches by a softmax over bit-widths.

  Returned is the most probable assignment within the budgets: the argmax of
  every layer where that fits, else its exact projection. It takes a single
  evaluation, but also `steps` training steps, each of which quantizes to all
  candidates; these count as seconds only.

  Args:
    problem: with network, state and batches.
    budgets: {name of a cost: upper bound}.
    seed: has no effect, unless the network itself draws (dropout).
    steps: batches to train on.
    learning_rate: of the weights, Adam.
    logit_learning_rate: of the logits, Adam.
    strength: what exceeding a budget by all of it costs, in nats of
      cross-entropy; several budgets add up.
    checkpoint_every: steps between checkpoints in `problem.directory`.

  Raises:
    ValueError: for a wrong option, a problem without a network,
      and as `Problem.check`.
    train.NonFiniteError: if the loss or a parameter becomes NaN or infinite.

  References:
    arXiv 2004.05795, section 4.
  """
  return _search(
    problem,
    budgets,
    "edmips",
    seed=seed,
    steps=steps,
    learning_rate=learning_rate,
    logit_learning_rate=logit_learning_rate,
    strength=strength,
    checkpoint_every=checkpoint_every,
  )


def dnas(
  problem: Problem,
  budgets: Mapping[str, int],
  *,
  seed: int = 0,
  steps: int = 200,
  learning_rate: float = 1e-3,
  logit_learning_rate: float = 0.05,
  strength: float = 0.3,
  temperature: float = 5.0,
  final_temperature: float = 0.5,
  checkpoint_every: int = 50,
) -> Result:
  """Searches by samples of a Gumbel-softmax with falling temperature.

  Weights learn from batches 0, 2, ..., logits from 1, 3, ...; the temperature
  falls exponentially over the search. The cost enters as in `edmips`: the
  published loss multiplies the cross-entropy by a power of the logarithm of
  the cost instead.

  Args:
    problem, budgets, learning_rate, logit_learning_rate, strength,
      checkpoint_every: as for `edmips`.
    seed: decides the noise.
    steps: batches to train on, weights and logits together.
    temperature, final_temperature: at the first and at the last step.

  Raises:
    As `edmips`.

  References:
    arXiv 1812.00090, section 4.
  """
  return _search(
    problem,
    budgets,
    "dnas",
    seed=seed,
    steps=steps,
    learning_rate=learning_rate,
    logit_learning_rate=logit_learning_rate,
    strength=strength,
    temperature=temperature,
    final_temperature=final_temperature,
    checkpoint_every=checkpoint_every,
  )


def mixture(
  logits: jax.Array, key: jax.Array, step: jax.Array, knobs: Knobs
) -> jax.Array:
  """Returns the probabilities that a step computes with, float32 [L, B].

  Args:
    logits: float32 [G, B], one row per group of tied layers.
    key: typed PRNG key of the search; a step draws from fold_in(key, step).
    step: int32 scalar, counts from 0.
    knobs: of the search.
  """
  progress = step.astype(jnp.float32) / jnp.maximum(knobs.steps - 1, 1)
  temperature = knobs.hot * (knobs.cold / knobs.hot) ** progress
  drawn = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape)
  free = jax.nn.softmax((logits + knobs.noise * drawn) / temperature)
  pinned = jnp.eye(logits.shape[-1], dtype=logits.dtype)
  return jnp.concatenate([free, pinned])[knobs.rows]


def loss(
  trained: dict[str, Any],
  apply: Callable[..., Any],
  state: TrainState,
  batch: Mapping[str, jax.Array],
  knobs: Knobs,
) -> tuple[jax.Array, Any]:
  """Returns the cross-entropy plus what budgets are exceeded by, priced.

  Args:
    trained: {"weights": params of the network, "logits": float32 [G, B]}.
    apply: of the network.
    state: batch statistics, key and step.
    batch: "image" [n, ...] and "label" int [n].
    knobs: of the search.

  Returns:
    The scalar float32, and the new batch statistics.
  """
  mixed = mixture(trained["logits"], state.key, state.step, knobs)
  outputs, stats = apply(
    trained["weights"], state.batch_stats, mixed, batch["image"], train=True
  )
  used = (mixed[None] * knobs.shares).sum((1, 2))
  excess = jax.nn.relu(used - 1).sum()
  value = cross_entropy(outputs, batch["label"]) + knobs.strength * excess
  return value, stats


@functools.lru_cache(maxsize=2)
def program(
  apply: Callable, param_labels: tuple[str, ...], treedef: Any
) -> Callable:
  """Builds the step of a network; kept, so that it compiles once.

  Args:
    apply: of the network.
    param_labels, treedef: `jax.tree.flatten(network.param_labels)`, hashable.

  Returns:
    step(state, batch, knobs) -> (state, losses [1]); the state is donated.
  """
  param_labels = treedef.unflatten(param_labels)
  optimizers = _optimizers(param_labels)

  @functools.partial(jit, donate_argnums=0)
  def step(state, batch, knobs):
    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(
      state.params, apply, state, batch, knobs
    )
    even = state.step % 2 == 0
    plan = {
      "weights": (knobs.learning_rate, ~knobs.alternate | even),
      "logits": (knobs.logit_learning_rate, ~knobs.alternate | ~even),
    }
    params, opt_state = {}, {}
    for name, (rate, learns) in plan.items():
      old = state.params[name], state.opt_state[name]
      new = _stepped(optimizers[name], gradients[name], *old, rate)
      params[name], opt_state[name] = jax.tree.map(
        functools.partial(jnp.where, learns), new, old
      )
    params["weights"] = jax.tree.map(_bounded, param_labels, params["weights"])
    state = state._replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      batch_stats=stats,
    )
    return state, value[None]

  return step


def most_probable(
  problem: Problem, logits: np.ndarray, budgets: Mapping[str, int]
) -> Index:
  """Returns the assignment of greatest probability within the budgets.

  Args:
    problem: its groups are what the logits are of.
    logits: [G, B].
    budgets: {name of a cost: upper bound}.

  Raises:
    As `Problem.solve`.
  """
  surprise = np.zeros((len(problem.table), len(problem.bits)))
  for group, row in zip(problem.groups(), logits, strict=True):
    # A group is one choice, however many layers it has.
    surprise[group[0]] = -jax.nn.log_softmax(np.asarray(row, np.float32))
  return problem.solve(surprise, budgets)


def _search(problem, budgets, name, **options):
  ledger = Ledger(problem, budgets)
  _check(problem, name, options)
  if not problem.groups():
    return ledger.result(problem.start(0))
  knobs = _knobs(problem, budgets, name, options)
  network, steps = problem.network, options["steps"]
  param_labels, treedef = jax.tree.flatten(network.param_labels)
  step = program(network.apply, tuple(param_labels), treedef)
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if problem.directory is not None:
      run = _fingerprint(problem, options, knobs)
      directory = problem.directory / f"{name}-{run}"
      # One is enough: it weighs several networks, and a search is short.
      checkpoints = stack.enter_context(Checkpoints(directory, keep=1))
    state = _initial(problem, options["seed"])
    if checkpoints is not None and checkpoints.latest() is not None:
      state = checkpoints.restore(like=state)
    state = Loop(
      stage=name,
      steps=steps,
      labels=("mixed",),
      step=lambda state, batch: step(state, batch, knobs),
      batches=problem.batches,
      checkpoints=checkpoints,
      checkpoint_every=options["checkpoint_every"],
      interrupted=problem.interrupted,
    ).run(state)
  logits = np.asarray(state.params["logits"])
  return ledger.result(most_probable(problem, logits, budgets))


def _check(problem, name, options):
  for field in ("network", "state", "batches"):
    if getattr(problem, field) is None:
      raise ValueError(
        f"problem.{field} must not be None, since {name} trains: it needs a "
        "network, its state, and training batches"
      )
  for field, value in options.items():
    rule, fits = _RULES[field]
    if not fits(value):
      raise ValueError(f"{field} must be {rule}, got {value!r}")


def _counts(value):
  return isinstance(value, int) and value > 0


def _finite(value):
  return isinstance(value, int | float) and math.isfinite(value)


def _positive(value):
  return _finite(value) and value > 0


_RULES = {
  "seed": ("an integer", lambda value: isinstance(value, int)),
  "steps": ("an integer >= 1", _counts),
  "checkpoint_every": ("an integer >= 1", _counts),
  "strength": ("finite and >= 0", lambda v: _finite(v) and v >= 0),
  "learning_rate": ("finite and > 0", _positive),
  "logit_learning_rate": ("finite and > 0", _positive),
  "temperature": ("finite and > 0", _positive),
  "final_temperature": ("finite and > 0", _positive),
}


def _knobs(problem, budgets, name, options):
  groups = problem.groups()
  rows = len(groups) + problem.start(0)
  for number, group in enumerate(groups):
    rows[list(group)] = number
  shares = [
    np.asarray(problem.costs[cost]) / limit for cost, limit in budgets.items()
  ]
  drawn = name == "dnas"
  return Knobs(
    rows=rows.astype(np.int32),
    shares=np.stack(shares).astype(np.float32),
    strength=np.float32(options["strength"]),
    learning_rate=np.float32(options["learning_rate"]),
    logit_learning_rate=np.float32(options["logit_learning_rate"]),
    hot=np.float32(options.get("temperature", 1)),
    cold=np.float32(options.get("final_temperature", 1)),
    steps=np.float32(options["steps"]),
    noise=np.float32(drawn),
    alternate=np.bool_(drawn),
  )


def _optimizers(param_labels):
  return {
    "weights": make_optimizer("adam", param_labels=param_labels),
    "logits": optax.scale_by_adam(),
  }


def _stepped(optimizer, gradients, params, opt_state, rate):
  directions, opt_state = optimizer.update(gradients, opt_state, params)
  params = jax.tree.map(
    lambda p, d: p - (rate * d).astype(p.dtype), params, directions
  )
  return params, opt_state


def _bounded(kind, leaf):
  # Quantizers clamp what they read; the raw scale must not drift away.
  return jnp.clip(leaf, SCALE_MIN, SCALE_MAX) if kind == "scale" else leaf


def _initial(problem, seed):
  """The state at step 0, with its own copies of the SuperNet's arrays."""
  weights, stats = jax.tree.map(jnp.array, problem.state)
  shape = (len(problem.groups()), len(problem.bits))
  params = {"weights": weights, "logits": jnp.zeros(shape, jnp.float32)}
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state={
      name: optimizer.init(params[name])
      for name, optimizer in _optimizers(problem.network.param_labels).items()
    },
    batch_stats=stats,
    key=jax.random.key(seed),
    memory={},
  )


def _fingerprint(problem, options, knobs):
  """Names what checkpoints belong to: the SuperNet and what was asked."""
  digest = hashlib.sha256()
  digest.update(json.dumps([problem.bits, options]).encode())
  for knob in knobs:
    digest.update(np.asarray(knob).tobytes())
  digest.update(tree.fingerprint(problem.state).encode())
  return digest.hexdigest()[:16]
