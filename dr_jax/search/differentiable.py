"""Search by gradient: probabilities of bit-widths, trained with the weights.

Every group of tied layers g has logits a_g over the B candidates. The network
computes with mixtures: what a weight, an input, a norm's row would be at each
candidate, averaged by probabilities m_lb. One batch takes one step on

  CE(batch; weights, m) + strength * max(0, E / budget - 1)
  E = sum_l sum_b m_lb cost_lb, the expected cost

`edmips` and `dnas` differ in m and in which batches train what. Their papers
price all of E, budget or not, and try strengths until the result is cheap
enough; a price on what exceeds the budget aims at it. The result is the most
probable assignment within the budgets. Weights change in a copy: the assignment
is scored on the SuperNet as it was, without retraining, as in all searches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.quant import SCALE_MAX, SCALE_MIN
from dr_jax.runtime import tree
from dr_jax.runtime.compilation import jit
from dr_jax.search.evaluator import Evaluator, SuperNet
from dr_jax.search.log import Result, SearchLog
from dr_jax.search.problem import Index, Problem
from dr_jax.train import Loop, TrainState, cross_entropy, make_optimizer


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a search by gradient.

  Attributes:
    seed: decides the noise.
    steps: batches to train on.
    learning_rate, logit_learning_rate: of the weights and of the logits, Adam.
    strength: what exceeding a budget by all of it costs, in nats of
      cross-entropy; several budgets add up.
    checkpoint_every: steps between checkpoints in `SuperNet.directory`.
    temperature, final_temperature: at the first and at the last step.
    drawn: whether probabilities are drawn by Gumbel noise, and weights and
      logits learn from separate batches.
  """

  seed: int
  steps: int
  learning_rate: float
  logit_learning_rate: float
  strength: float
  checkpoint_every: int
  temperature: float = 1.0
  final_temperature: float = 1.0
  drawn: bool = False


class Hyperparams(NamedTuple):
  """Arrays that a step takes as arguments: one program serves all searches.

  Attributes:
    rows: int32 [L], where each layer finds its probabilities: the number of
      its group, or, pinned, the number of groups plus its position.
    relative_costs: float32 [budgets, L, B], costs over their budgets.
    strength, learning_rate, logit_learning_rate: float32, as in Options.
    hot, cold: float32, temperature at the first and the last step.
    steps: float32, length of the search.
    noise: float32, 1 to draw probabilities, 0 not to.
    alternate: bool, whether weights and logits learn from separate batches.
  """

  rows: ArrayLike
  relative_costs: ArrayLike
  strength: ArrayLike
  learning_rate: ArrayLike
  logit_learning_rate: ArrayLike
  hot: ArrayLike
  cold: ArrayLike
  steps: ArrayLike
  noise: ArrayLike
  alternate: ArrayLike


def mixture(
  logits: jax.Array, key: jax.Array, step: jax.Array, hyperparams: Hyperparams
) -> jax.Array:
  """Returns the probabilities that a step computes with, float32 [L, B].

  Args:
    logits: float32 [G, B], one row per group of tied layers.
    key: typed PRNG key of the search; a step draws from fold_in(key, step).
    step: int32 scalar, counts from 0.
    hyperparams: of the search.
  """
  progress = step.astype(jnp.float32) / jnp.maximum(hyperparams.steps - 1, 1)
  temperature = (
    hyperparams.hot * (hyperparams.cold / hyperparams.hot) ** progress
  )
  drawn = jax.random.gumbel(jax.random.fold_in(key, step), logits.shape)
  free = jax.nn.softmax((logits + hyperparams.noise * drawn) / temperature)
  pinned = jnp.eye(logits.shape[-1], dtype=logits.dtype)
  return jnp.concatenate([free, pinned])[hyperparams.rows]


def loss(
  trained: dict[str, Any],
  apply: Callable[..., Any],
  state: TrainState,
  batch: Mapping[str, jax.Array],
  hyperparams: Hyperparams,
) -> tuple[jax.Array, Any]:
  """Returns the cross-entropy plus what budgets are exceeded by, priced.

  Args:
    trained: {"weights": params of the network, "logits": float32 [G, B]}.
    apply: of the network.
    state: batch statistics, key and step.
    batch: "image" [n, ...] and "label" int [n].
    hyperparams: of the search.

  Returns:
    The scalar float32, and the new batch statistics.
  """
  mixed = mixture(trained["logits"], state.key, state.step, hyperparams)
  outputs, stats = apply(
    trained["weights"], state.batch_stats, mixed, batch["image"], train=True
  )
  used = (mixed[None] * hyperparams.relative_costs).sum((1, 2))
  excess = jax.nn.relu(used - 1).sum()
  value = cross_entropy(outputs, batch["label"]) + hyperparams.strength * excess
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
    step(state, batch, hyperparams) -> (state, losses [1]), donating the state.
  """
  param_labels = treedef.unflatten(param_labels)
  optimizers = _optimizers(param_labels)

  @functools.partial(jit, donate_argnums=0)
  def step(state, batch, hyperparams):
    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(
      state.params, apply, state, batch, hyperparams
    )
    even = state.step % 2 == 0
    plan = {
      "weights": (hyperparams.learning_rate, ~hyperparams.alternate | even),
      "logits": (
        hyperparams.logit_learning_rate,
        ~hyperparams.alternate | ~even,
      ),
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


def search_by_gradient(
  name: str,
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  supernet: SuperNet,
  options: Options,
) -> Result:
  """Trains weights and logits, and takes the most probable assignment.

  Args:
    name: of the search, for its messages and its checkpoints.
    problem, budgets, evaluate, supernet: as for the searches.
    options: how to train.

  Raises:
    As the searches.
  """
  log = SearchLog(problem, budgets, evaluate)
  if not problem.groups():
    return log.result(problem.start(0))
  hyperparams = _hyperparams(problem, budgets, options)
  network = supernet.network
  param_labels, treedef = jax.tree.flatten(network.param_labels)
  step = program(network.apply, tuple(param_labels), treedef)
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if supernet.directory is not None:
      run = _fingerprint(problem, supernet, options, hyperparams)
      directory = supernet.directory / f"{name}-{run}"
      # One is enough: it weighs several networks, and a search is short.
      checkpoints = stack.enter_context(Checkpoints(directory, keep=1))
    state = _initial(problem, supernet, options.seed)
    if checkpoints is not None and checkpoints.latest() is not None:
      state = checkpoints.restore(like=state)
    state = Loop(
      stage=name,
      steps=options.steps,
      labels=("mixed",),
      step=lambda state, batch: (*step(state, batch, hyperparams), {}),
      batches=supernet.batches,
      checkpoints=checkpoints,
      checkpoint_every=options.checkpoint_every,
      interrupted=supernet.interrupted,
    ).run(state)
  logits = np.asarray(state.params["logits"])
  return log.result(most_probable(problem, logits, budgets))


def _hyperparams(problem, budgets, options):
  groups = problem.groups()
  rows = len(groups) + problem.start(0)
  for number, group in enumerate(groups):
    rows[list(group)] = number
  relative_costs = [
    np.asarray(problem.costs[cost]) / limit for cost, limit in budgets.items()
  ]
  return Hyperparams(
    rows=rows.astype(np.int32),
    relative_costs=np.stack(relative_costs).astype(np.float32),
    strength=np.float32(options.strength),
    learning_rate=np.float32(options.learning_rate),
    logit_learning_rate=np.float32(options.logit_learning_rate),
    hot=np.float32(options.temperature),
    cold=np.float32(options.final_temperature),
    steps=np.float32(options.steps),
    noise=np.float32(options.drawn),
    alternate=np.bool_(options.drawn),
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


def _initial(problem, supernet, seed):
  """The state at step 0, with its own copies of the SuperNet's arrays."""
  weights = jax.tree.map(jnp.array, supernet.params)
  stats = jax.tree.map(jnp.array, supernet.batch_stats)
  shape = (len(problem.groups()), len(problem.bits))
  params = {"weights": weights, "logits": jnp.zeros(shape, jnp.float32)}
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state={
      name: optimizer.init(params[name])
      for name, optimizer in _optimizers(supernet.network.param_labels).items()
    },
    batch_stats=stats,
    key=jax.random.key(seed),
    memory={},
  )


def _fingerprint(problem, supernet, options, hyperparams):
  """Identifies what checkpoints belong to: the SuperNet and the search."""
  digest = hashlib.sha256()
  named = dataclasses.asdict(options)
  digest.update(json.dumps([problem.bits, named]).encode())
  for array in hyperparams:
    digest.update(np.asarray(array).tobytes())
  arrays = (supernet.params, supernet.batch_stats)
  digest.update(tree.fingerprint(arrays).encode())
  return digest.hexdigest()[:16]
