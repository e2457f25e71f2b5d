"""Search by reinforcement learning: an agent walks the layers (HAQ).

An episode is one pass over the groups of layers. At each the agent (`ddpg`)
sees the layer's features and its own last action and answers with an action a
in [0, 1], which means a bit-width

  b = round(low - 1/2 + a (high - low + 1))

so that the ends have as much of [0, 1] as the others. The whole assignment then
earns one reward, which every step of the pass is given. Here an assignment is
scored on the SuperNet by inference: nothing is fine-tuned. HAQ: CVPR 2019,
arXiv 1811.08886, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from dr_jax.nn import LayerTable
from dr_jax.search.assignments import nearest
from dr_jax.search.ddpg import Ddpg, Memory, programs, steps
from dr_jax.search.evaluator import Evaluator
from dr_jax.search.log import Result, SearchLog
from dr_jax.search.options import (
  Count,
  CountFrom0,
  Fraction,
  Noise,
  PercentOrNone,
  Seed,
  Size,
  check_options,
)
from dr_jax.search.problem import Index, Problem

# Reward per percent of accuracy.
_REWARD = 0.1


def reinforce(
  problem: Problem,
  budgets: Mapping[str, int],
  evaluate: Evaluator,
  *,
  seed: Seed = 0,
  episodes: Count = 600,
  warmup: CountFrom0 = 21,
  reference: PercentOrNone = None,
  hidden: Size = 300,
  actor_rate: Fraction = 1e-4,
  critic_rate: Fraction = 1e-3,
  tau: Fraction = 0.01,
  discount: Fraction = 1.0,
  replay: Size = 128,
  batch: Size = 64,
  noise: Noise = 0.5,
  decay: Fraction = 0.99,
  baseline: Fraction = 0.95,
) -> Result:
  """Lets a DDPG agent assign bit-widths; returns the best that was scored.

  The first episodes act at random. From then on the actor's action is the mean
  of a normal distribution, truncated to [0, 1], that narrows with every
  episode, and after each the agent learns once per step of it. An assignment
  over a budget is cut (`cut`) before it is scored, and the agent learns from
  the bit-widths that were scored: given that its own actions had earned the
  reward, it saw no reason to ask for less than all bits everywhere. Rewards are
  accuracies, whatever `problem.metric` says; that decides at the end.

  Args:
    problem, budgets, evaluate: what to assign, {cost: limit}, and the scores.
    seed: of the networks and all draws.
    episodes: passes over the layers, the random ones included.
    warmup: how many of them act at random, without learning.
    reference: accuracy in percent that earns no reward; None scores the
      highest bit-width everywhere, one evaluation more. Rewards are compared
      to their own average, so that it only says how large they are.
    hidden: size of both hidden layers of actor and critic.
    actor_rate, critic_rate: learning rates, of Adam.
    tau: fraction by which the copies follow at each update.
    discount: of what follows a step.
    replay: steps that are remembered, per group of layers.
    batch: steps that an update learns from.
    noise: standard deviation of the normal distribution, 0 for none, in the
      first episode after the random ones.
    decay: factor on it per episode.
    baseline: how much the moving average of rewards keeps per episode.

  Raises:
    allocate.Infeasible: if nothing fits.
    ValueError: for a wrong budget or option.

  References:
    HAQ, arXiv 1811.08886, section 3; DDPG, arXiv 1509.02971.
  """
  check_options(reinforce, locals())
  log = SearchLog(problem, budgets, evaluate)
  groups = problem.groups()
  if not groups:
    return log.result(problem.start(0))
  if reference is None:
    reference = log(problem.start(0)).accuracy
  rng = np.random.Generator(np.random.PCG64(seed))
  ddpg = Ddpg(actor_rate, critic_rate, tau, discount)
  walk, learn = programs(ddpg)
  states = features(problem.table, groups)
  agent = ddpg.init(rng, states.shape[1] + 1, hidden)
  memory = Memory(replay * len(groups), states.shape[1] + 1)
  average = None
  for episode in range(episodes):
    actions = rng.random(len(groups), np.float32)
    if episode >= warmup:
      width = np.float32(noise * decay ** (episode - warmup))
      actions = np.asarray(walk(agent.actor, states, actions, width))
    index = problem.start(0)
    for group, action in zip(groups, actions, strict=True):
      index[list(group)] = position(action, problem.bits)
    trial = log(cut(problem, budgets, index))
    reward = _REWARD * (trial.accuracy - reference)
    average = reward if average is None else average
    average = baseline * average + (1 - baseline) * reward
    taken = [action_of(trial.index[g[0]], problem.bits) for g in groups]
    memory.add(steps(states, np.asarray(taken, np.float32), reward))
    if episode >= warmup:
      batches = memory.sample(rng, (len(groups), batch))
      agent = learn(agent, batches, np.float32(average))
  return log.result()


def features(table: LayerTable, groups: Sequence[Sequence[int]]) -> np.ndarray:
  """What the agent sees of each group but for the last action.

  Depthwise or not, input channels of one filter, output channels, stride,
  window, parameters, input size, number of the layer. Tied layers add up
  parameters; the rest is of the first one. Windows and inputs count one side,
  of a square; a filter with one input channel is taken for depthwise.

  Returns:
    float32 [G, 8], each column from 0 to 1; a constant one is 0.

  References:
    arXiv 1811.08886, section 3.
  """
  columns = np.zeros((len(groups), 8))
  for number, group in enumerate(groups):
    row = table[group[0]]
    *window, c_in, c_out = row.shape
    positions = row.macs / row.parameters
    columns[number] = (
      bool(window) and c_in == 1,
      c_in,
      c_out,
      row.stride,
      max(window, default=1),
      sum(table[layer].parameters for layer in group),
      positions ** (1 / max(len(window), 1)) * row.stride,
      group[0],
    )
  low, high = columns.min(0), columns.max(0)
  spread = np.where(high > low, high - low, 1)
  return ((columns - low) / spread).astype(np.float32)


def position(action: float, bits: Sequence[int]) -> int:
  """The candidate that an action means.

  Args:
    action: in [0, 1], from the lowest to the highest bit-width.
    bits: candidate bit-widths, highest first.

  Returns:
    Position of the bit-width nearest to low - 1/2 + action * (high - low + 1);
    of two as near, the lower one. Neighboring candidates all have the same
    length of [0, 1].

  References:
    arXiv 1811.08886, section 3.2.
  """
  return sum(float(action) <= edge for edge in _edges(bits)[1:-1])


def action_of(position: int, bits: Sequence[int]) -> float:
  """The middle of the actions that mean the candidate at a position."""
  above, below = _edges(bits)[position : position + 2]
  return (above + below) / 2


def cut(
  problem: Problem,
  budgets: Mapping[str, int],
  index: Sequence[int] | np.ndarray,
) -> Index:
  """Brings an assignment to the budgets, from the last group to the first.

  Each group loses one position, then all of them another one, until the
  budgets hold. Only where that leads nowhere, because fewer bits cost more,
  the `nearest` assignment takes its place.

  Args:
    problem, budgets: what to assign, and {cost: limit}, feasible.
    index: [L], keeping ties and pins.
  """
  lowered, last = np.array(index), len(problem.bits) - 1
  groups = [list(group) for group in reversed(problem.groups())]
  for group in groups * last:
    if problem.fits(lowered, budgets):
      break
    lowered[group] = min(lowered[group[0]] + 1, last)
  if not problem.fits(lowered, budgets):
    return nearest(problem, budgets, index)
  return tuple(map(int, lowered))


def _edges(bits):
  """Actions between which each candidate lies, from 1 down to 0, [B + 1]."""
  low, high = bits[-1], bits[0]
  halfway = ((one + two) / 2 for one, two in itertools.pairwise(bits))
  return [
    (at - low + 0.5) / (high - low + 1)
    for at in (high + 0.5, *halfway, low - 0.5)
  ]
