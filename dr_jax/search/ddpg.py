"""Deep deterministic policy gradient: an agent that acts by steps.

At each step of an episode the actor mu sees a state s, which is features and
its own last action, and answers with an action a in [0, 1]. The critic Q learns
from replayed steps

  Q(s, a)  ->  R - baseline + discount * Q'(s', mu'(s'))     (no Q' at the end)

and the actor climbs Q(s, mu(s)); primes are copies that follow by a fraction
tau (DDPG, arXiv 1509.02971, algorithm 1). Every step of an episode has the
reward R of the whole, and actions are drawn from a truncated normal
distribution (HAQ, arXiv 1811.08886, section 3).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dr_jax.runtime.compilation import jit

# The action before the first one.
_BEFORE = 1.0
# Narrower distributions are their mean, and zero would divide by zero.
_NARROWEST = 1e-6

Network = list[tuple[jax.Array, jax.Array]]


class Steps(NamedTuple):
  """Steps of episodes, any number of leading axes.

  Attributes:
    state, after: float32 [..., S], what the agent sees before and after.
    action: float32 [..., 1].
    reward: float32 [..., 1], of the whole episode.
    last: float32 [..., 1], 1 where the episode ends and `after` means nothing.
  """

  state: Any
  action: Any
  reward: Any
  after: Any
  last: Any


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

  Attributes:
    actor_rate, critic_rate: learning rates, of Adam.
    tau: fraction by which the copies follow at each update.
    discount: of what follows a step.
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
    copies: Any = optax.incremental_update(
      (actor, critic), (agent.slow_actor, agent.slow_critic), self.tau
    )
    return Agent(
      actor=actor,
      critic=critic,
      slow_actor=copies[0],
      slow_critic=copies[1],
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
    weight, bias = (
      rng.uniform(-bound, bound, (n, m)),
      rng.uniform(-bound, bound, m),
    )
    layers.append(
      (jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32))
    )
  return layers


def _forward(network, x):
  *layers, (weight, bias) = network
  for w, b in layers:
    x = jax.nn.relu(x @ w + b[None])
  return x @ weight + bias[None]


def _descend(loss, params, state, rate):
  updates, state = optax.adam(rate).update(jax.grad(loss)(params), state)
  return optax.apply_updates(params, updates), state
