"""Search by reinforcement learning: an agent walks the layers (HAQ).

An episode is one pass over the groups of layers. At each the actor mu sees the
layer's features and its own last action and answers with an action in [0, 1],
which means a bit-width; the whole assignment then earns one reward R, which
every step of the pass is given. The critic Q learns from replayed steps

  Q(s, a)  ->  R - baseline + discount * Q'(s', mu'(s'))     (no Q' at the end)

and the actor climbs Q(s, mu(s)); primes are copies that follow by a share tau
(DDPG, arXiv 1509.02971, algorithm 1). Here an assignment is judged on the
SuperNet by inference: nothing is fine-tuned. HAQ: CVPR 2019, arXiv 1811.08886.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dr_jax.compilation import jit
from dr_jax.nn import LayerTable
from dr_jax.search.floors import check_count, nearest
from dr_jax.search.problem import Index, Ledger, Problem, Result

# Reward per percent of accuracy.
_REWARD = 0.1
# The action before the first one, as if of the highest bit-width.
_BEFORE = 1.0
# Narrower distributions are their mean, and zero would divide by zero.
_NARROWEST = 1e-6

Network = list[tuple[jax.Array, jax.Array]]


def reinforce(
  problem: Problem,
  budgets: Mapping[str, int],
  *,
  seed: int = 0,
  episodes: int = 600,
  warmup: int = 21,
  reference: float | None = None,
  hidden: int = 300,
  actor_rate: float = 1e-4,
  critic_rate: float = 1e-3,
  tau: float = 0.01,
  discount: float = 1.0,
  replay: int = 128,
  batch: int = 64,
  noise: float = 0.5,
  decay: float = 0.99,
  baseline: float = 0.95,
) -> Result:
  """Lets a DDPG agent assign bit-widths; returns the best that was scored.

  The first episodes act at random. From then on the actor's action is the mean
  of a normal distribution, truncated to [0, 1], that narrows with every
  episode, and after each the agent learns once per step of it. An assignment
  over a budget is cut (`cut`) before it is scored, and the agent learns from
  the bit-widths that were scored: told that its own actions had earned the
  reward, it saw no reason to ask for less than all bits everywhere. Rewards are
  accuracies, whatever `problem.prefer` says; that decides at the end.

  Args:
    problem, budgets: what to assign, and {cost: limit}.
    seed: of the networks and all draws.
    episodes: passes over the layers, the random ones included.
    warmup: how many of them act at random, without learning.
    reference: accuracy in percent that earns no reward; None scores the
      highest bit-width everywhere, one evaluation more. Rewards are compared
      to their own average, so that it only says how large they are.
    hidden: size of both hidden layers of actor and critic.
    actor_rate, critic_rate: learning rates, of Adam.
    tau: share by which the copies follow at each update.
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
  ledger = Ledger(problem, budgets)
  for name, count, least in (
    ("episodes", episodes, 1),
    ("warmup", warmup, 0),
    ("hidden", hidden, 1),
    ("replay", replay, 1),
    ("batch", batch, 1),
  ):
    check_count(name, count, least)
  for name, number, most in (
    ("reference", 0 if reference is None else reference, 100),
    ("actor_rate", actor_rate, 1),
    ("critic_rate", critic_rate, 1),
    ("tau", tau, 1),
    ("discount", discount, 1),
    ("noise", noise, 10),
    ("decay", decay, 1),
    ("baseline", baseline, 1),
  ):
    if not (isinstance(number, numbers.Real) and 0 <= number <= most):
      raise ValueError(f"{name}={number!r}: outside; allowed are 0..{most}")
  groups = problem.groups()
  if not groups:
    return ledger.result(problem.start(0))
  if reference is None:
    reference = ledger(problem.start(0)).accuracy
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
    trial = ledger(cut(problem, budgets, index))
    reward = _REWARD * (trial.accuracy - reference)
    average = reward if average is None else average
    average = baseline * average + (1 - baseline) * reward
    taken = [action_of(trial.index[g[0]], problem.bits) for g in groups]
    memory.add(steps(states, np.float32(taken), reward))
    if episode >= warmup:
      batches = memory.sample(rng, (len(groups), batch))
      agent = learn(agent, batches, np.float32(average))
  return ledger.result()


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
    Position of the bit-width nearest to low + action * (high - low); of two as
    near, the lower one. With neighbouring candidates this is rounding; the
    ends have half the range of the others.
  """
  wanted = bits[-1] + float(action) * (bits[0] - bits[-1])
  return min(
    range(len(bits)), key=lambda at: (abs(bits[at] - wanted), bits[at])
  )


def action_of(position: int, bits: Sequence[int]) -> float:
  """The action in [0, 1] that means exactly the candidate at a position."""
  return (bits[position] - bits[-1]) / max(bits[0] - bits[-1], 1)


def cut(
  problem: Problem, budgets: Mapping[str, int], index: Sequence[int]
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


class Steps(NamedTuple):
  """Steps of episodes, any number of leading axes.

  Attributes:
    state, after: float32 [..., S], what the agent sees before and after.
    action: float32 [..., 1].
    reward: float32 [..., 1], of the whole episode.
    last: float32 [..., 1], 1 where the episode ends and `after` means nothing.
  """

  state: np.ndarray
  action: np.ndarray
  reward: np.ndarray
  after: np.ndarray
  last: np.ndarray


def steps(states: np.ndarray, actions: np.ndarray, reward: float) -> Steps:
  """The steps of one episode, from features [G, F] and actions [G]."""
  before = np.roll(actions, 1)
  before[0] = _BEFORE
  state = np.concatenate([states, before[:, None]], 1)
  ends = np.arange(len(actions)) == len(actions) - 1
  return Steps(
    state=state,
    action=actions[:, None],
    reward=np.full((len(actions), 1), reward, np.float32),
    after=np.roll(state, -1, 0),
    last=ends.astype(np.float32)[:, None],
  )


class Memory:
  """The latest steps; new ones take the place of the oldest."""

  def __init__(self, size: int, width: int):
    self._kept = Steps(
      *(np.zeros((size, n), np.float32) for n in (width, 1, 1, width, 1))
    )
    self._size, self._added = size, 0

  def add(self, new: Steps) -> None:
    """Remembers the steps of an episode, [G, ...]."""
    rows = np.arange(self._added, self._added + len(new.action)) % self._size
    for kept, values in zip(self._kept, new, strict=True):
      kept[rows] = values
    self._added += len(rows)

  def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Steps:
    """Draws remembered steps with replacement, [*shape, ...]."""
    rows = rng.integers(min(self._added, self._size), size=shape)
    return Steps(*(kept[rows] for kept in self._kept))


class Agent(NamedTuple):
  """Networks of the agent and their optimizers.

  Attributes:
    actor, critic: [(weight [n, m], bias [m])] by layer, float32.
    slow_actor, slow_critic: the copies that follow.
    actor_state, critic_state: of Adam.
  """

  actor: Network
  critic: Network
  slow_actor: Network
  slow_critic: Network
  actor_state: optax.OptState
  critic_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Ddpg:
  """Deep deterministic policy gradient, for one action in [0, 1].

  Attributes: see `reinforce`.
  """

  actor_rate: float
  critic_rate: float
  tau: float
  discount: float

  def init(self, rng: np.random.Generator, width: int, hidden: int) -> Agent:
    """A new agent that sees `width` numbers; copies start as equals."""
    actor = _network(rng, [width, hidden, hidden, 1])
    critic = _network(rng, [width + 1, hidden, hidden, 1])
    return Agent(
      actor=actor,
      critic=critic,
      slow_actor=actor,
      slow_critic=critic,
      actor_state=optax.adam(self.actor_rate).init(actor),
      critic_state=optax.adam(self.critic_rate).init(critic),
    )

  def update(self, agent: Agent, batch: Steps, baseline: jax.Array) -> Agent:
    """Critic, actor, then their copies learn from one batch [N, ...].

    Args:
      agent: as it is.
      batch: steps [N, ...].
      baseline: float32 scalar, what rewards are compared to.
    """
    follows = value(
      agent.slow_critic, batch.after, act(agent.slow_actor, batch.after)
    )
    target = batch.reward - baseline
    target += self.discount * (1 - batch.last) * follows

    def error(critic):
      return jnp.square(
        value(critic, batch.state, batch.action) - target
      ).mean()

    critic, critic_state = _descend(
      error, agent.critic, agent.critic_state, self.critic_rate
    )

    def loss(actor):
      return -value(critic, batch.state, act(actor, batch.state)).mean()

    actor, actor_state = _descend(
      loss, agent.actor, agent.actor_state, self.actor_rate
    )
    return Agent(
      actor=actor,
      critic=critic,
      slow_actor=optax.incremental_update(actor, agent.slow_actor, self.tau),
      slow_critic=optax.incremental_update(critic, agent.slow_critic, self.tau),
      actor_state=actor_state,
      critic_state=critic_state,
    )


@functools.cache
def programs(ddpg: Ddpg) -> tuple[Callable, Callable]:
  """Compiles what an episode needs, once for all searches of a shape.

  Returns:
    walk(actor, states [G, F], uniform [G], width) -> actions [G], and
    learn(agent, batches [U, N, ...], baseline) -> agent after U updates; all
    float32.
  """

  def walk(actor, states, uniform, width):
    def step(before, seen):
      features, drawn = seen
      state = jnp.concatenate([features, before])
      mean = act(actor, state[None])[0]
      action = truncated(mean, width, drawn[None])
      return action, action[0]

    start = jnp.full((1,), _BEFORE, jnp.float32)
    return jax.lax.scan(step, start, (states, uniform))[1]

  def learn(agent, batches, baseline):
    def step(agent, batch):
      return ddpg.update(agent, batch, baseline), None

    return jax.lax.scan(step, agent, batches)[0]

  return jit(walk), jit(learn)


def act(actor: Network, state: jax.Array) -> jax.Array:
  """What the actor would do: states [N, S] -> actions in (0, 1), [N, 1]."""
  return jax.nn.sigmoid(_forward(actor, state))


def value(critic: Network, state: jax.Array, action: jax.Array) -> jax.Array:
  """What the critic expects: [N, S] and [N, 1] -> [N, 1]."""
  return _forward(critic, jnp.concatenate([state, action], 1))


def truncated(
  mean: jax.Array, width: jax.Array, uniform: jax.Array
) -> jax.Array:
  """Turns uniform numbers into normal ones that are truncated to [0, 1].

  By the inverse of the distribution function, so that one number in [0, 1) is
  one draw.

  Args:
    mean: float32 in [0, 1], of the normal distribution before truncation.
    width: float32 scalar, its standard deviation.
    uniform: float32, shape of mean.
  """
  ndtr, ndtri = jax.scipy.special.ndtr, jax.scipy.special.ndtri
  width = jnp.maximum(width, _NARROWEST)
  low, high = ndtr(-mean / width), ndtr((1 - mean) / width)
  drawn = mean + width * ndtri(low + uniform * (high - low))
  return jnp.clip(drawn, 0, 1)


def _network(rng, sizes):
  """Draws from +-1 / sqrt(n), the last layer from +-3e-3 (1509.02971)."""
  layers = []
  for number, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
    bound = 3e-3 if number == len(sizes) - 2 else n**-0.5
    arrays = rng.uniform(-bound, bound, (n, m)), rng.uniform(-bound, bound, m)
    layers.append(tuple(jnp.asarray(a, jnp.float32) for a in arrays))
  return layers


def _forward(network, x):
  *layers, (weight, bias) = network
  for w, b in layers:
    x = jax.nn.relu(x @ w + b[None])
  return x @ weight + bias[None]


def _descend(loss, params, state, rate):
  updates, state = optax.adam(rate).update(jax.grad(loss)(params), state)
  return optax.apply_updates(params, updates), state
