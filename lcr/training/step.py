"""One update: the loss, its gradient piece by piece, and the state that it leaves.

    state = init_state(parameters, optimizer)
    step = make_step(functional, optimizer)              # jitted; donates the state
    state = step(state, select_predictions(batch))

Everything in `TrainState` is a plain pytree of arrays; the model's graph stays outside of the compiled function.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from lcr.typing import Array, Bool, Float, Int, Leaf

Parameters = dict[str, Any]

PREDICT_EVERYWHERE = 0.5  # share of a row's positions from which on choosing them costs more than it spares


def zero(dtype: str) -> Array:
    """A scalar with a buffer of its own: a donated state must not hold one buffer twice."""
    return jnp.zeros((), dtype)


@struct.dataclass
class Window:
    """Sums over the steps since the last logged row.

    loss: of the cross entropy (nats) of `count` predicted tokens, of which `correct` were right.
    grad_norm: of the gradient's norm before clipping, over `steps` steps.
    routing: of each mixture of experts' `load` and `entropy` over `steps` steps (see `Functional.routing`).
    """

    loss: Leaf  # float32
    correct: Leaf  # int32
    count: Leaf  # int32
    grad_norm: Leaf  # float32
    steps: Leaf  # int32
    routing: Leaf  # {"load": float32[n, layers, E], "entropy": float32[n, layers]} or {}

    @classmethod
    def empty(cls, routing: Mapping[str, Any]) -> "Window":
        """routing: arrays, or shapes, like those to be summed."""
        real, integer = (lambda: zero("float32")), (lambda: zero("int32"))
        return cls(
            loss=real(), correct=integer(), count=integer(), grad_norm=real(), steps=integer(),
            routing={name: jnp.zeros(like.shape, like.dtype) for name, like in routing.items()},
        )


@struct.dataclass
class Failure:
    """The first step (counted from 1; 0: none) whose loss or gradient was not finite, and what they were.

    From then on no step changes the parameters: they stay those of the last good step until somebody looks.
    """

    step: Leaf  # int32
    loss: Leaf  # float32
    grad_norm: Leaf  # float32


@struct.dataclass
class TrainState:
    """parameters: by dotted name, float32. step: how many updates were made."""

    parameters: Parameters
    optimizer: Any
    step: Leaf  # int32
    window: Window
    failure: Failure


class Functional:
    """A model as a function of its parameters: `functional.model(parameters)` is the model that holds them.

    names: the parameters' dotted names, "groups.blocks.0.mixer.in_proj", in the model's own order.
    variables: the `nnx.Param` of each name, for its metadata and shape.
    Raises ValueError where the model holds a variable that is no parameter: the trainer would not save it.
    """

    def __init__(self, model: nnx.Module):
        self.graph, state, other = nnx.split(model, nnx.Param, ...)
        if jax.tree.leaves(other):
            held = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(other)]
            raise ValueError(f"the model holds variables that are no nnx.Param: {', '.join(held)}; make them nnx.Param")
        self.other = other
        self.structure = jax.tree.structure(state)
        self.variables = named_parameters(state)

    def model(self, parameters: Mapping[str, Any]) -> nnx.Module:
        state = jax.tree.unflatten(self.structure, [parameters[name] for name in self.variables])
        return nnx.merge(self.graph, state, self.other)

    def apply(self, parameters: Mapping[str, Any], tokens, segment_ids, logits_at) -> tuple[Any, Any, dict[str, Any]]:
        """(logits, the routers' loss, {"load": [layers, E], "entropy": [layers]}); 0 and {} for a model without."""
        model = self.model(parameters)
        if not hasattr(model, "with_routing"):
            return model(tokens, segment_ids=segment_ids, logits_at=logits_at)[0], jnp.zeros((), jnp.float32), {}
        logits, _, routings = model.with_routing(tokens, segment_ids=segment_ids, logits_at=logits_at)
        loss = sum((routing.loss.sum() for routing in routings), jnp.zeros((), jnp.float32))
        if not routings:
            return logits, loss, {}
        # by layer: the repetitions are the outer loop, the blocks of the pattern the inner one
        load = jnp.stack([routing.load for routing in routings], axis=1)
        entropy = jnp.stack([routing.entropy for routing in routings], axis=1)
        return logits, loss, {"load": load.reshape(-1, load.shape[-1]), "entropy": entropy.reshape(-1)}

    def routing(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The shapes of what `apply` returns last."""
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return jax.eval_shape(lambda p, t: self.apply(p, t, None, None)[2], dict(parameters), tokens)


def named_parameters(state: Any) -> dict[str, nnx.Variable]:
    """The variables of an `nnx.State` by dotted name, in the order of its leaves."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def parameter_values(model: nnx.Module) -> Parameters:
    """The model's parameters by dotted name: what `TrainState.parameters` holds."""
    return {name: variable.get_value() for name, variable in named_parameters(nnx.state(model, nnx.Param)).items()}


def init_state(
    parameters: Parameters, optimizer: optax.GradientTransformation, functional: "Functional"
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        parameters=parameters,
        optimizer=optimizer.init(parameters),
        step=zero("int32"),
        window=Window.empty(functional.routing(parameters)),
        failure=Failure(step=zero("int32"), loss=zero("float32"), grad_norm=zero("float32")),
    )


def select_predictions(batch: Mapping[str, np.ndarray], accumulation: int = 1) -> dict[str, np.ndarray | None]:
    """What `make_step` takes, from a batch of the pipeline.

    batch: tokens int32[B, T], loss_mask bool[B, T], and segment_ids int32[B, T] where documents are packed.
    accumulation: rows that predict nothing are added until this divides them.

    Token t is predicted from position t - 1. It counts where `loss_mask[t]` says so and both belong to the same
    document. Returns tokens and segment_ids (or None) as they are; positions int32[B, P] from which to predict (None:
    all but the last); targets int32[B, P]; weights bool[B, P], True where a prediction counts. Where few tokens
    count, P is the most in any row, rounded up to a power of two, so that few shapes are compiled.
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    weights = batch["loss_mask"][:, 1:].copy()
    if segment_ids is not None:
        weights &= (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    targets, positions = tokens[:, 1:], None
    most = max(1, int(weights.sum(axis=1).max()))
    width = 1 << (most - 1).bit_length()
    if width <= PREDICT_EVERYWHERE * tokens.shape[1]:
        # a stable sort puts the counted positions first, in their order
        positions = np.argsort(~weights, axis=1, kind="stable")[:, :width].astype(np.int32)
        targets = np.take_along_axis(targets, positions, axis=1)
        weights = np.take_along_axis(weights, positions, axis=1)
    selected = {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": positions,
        "targets": targets,
        "weights": weights,
    }
    missing = -len(tokens) % accumulation
    return {
        key: value if value is None or not missing else np.pad(value, ((0, missing), (0, 0)))
        for key, value in selected.items()
    }


def cross_entropy(
    logits: Float[Array, "B P vocab"], targets: Int[Array, "B P"], weights: Bool[Array, "B P"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of -log softmax(logits)[target] (nats, in float32) where weights says, and how many argmaxes were right."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    right = (jnp.argmax(logits, axis=-1) == targets) & weights
    return jnp.where(weights, losses, 0).sum(), right.sum(dtype=jnp.int32)


def make_loss(functional: Functional, accumulation: int) -> Callable[..., Any]:
    """`loss(parameters, piece, total) -> (share, (sum, correct, routing))`: the piece's part of the mean over `total`
    tokens, and of the routers' loss."""

    def loss(parameters: Parameters, piece: dict[str, Any], total: Float[Array, ""]):
        logits, of_routers, routing = functional.apply(
            parameters, piece["tokens"], piece["segment_ids"], piece["positions"]
        )
        if piece["positions"] is None:
            logits = logits[:, :-1]
        summed, correct = cross_entropy(logits, piece["targets"], piece["weights"])
        routing = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) / accumulation, routing)
        return summed / total + of_routers / accumulation, (summed, correct, routing)

    return loss


def make_step(
    functional: Functional, optimizer: optax.GradientTransformation, accumulation: int = 1
) -> Callable[[TrainState, dict[str, Any]], TrainState]:
    """The compiled update: one program for each shape of batch; the state given is donated.

    The loss is the mean cross entropy over all counted tokens of the batch. With accumulation = A the rows are cut
    into A pieces, taken one after another, whose gradients, each weighted by its tokens, add up to the whole's: less
    memory, the same update up to rounding. Where loss or gradient is not finite nothing changes but `failure`.
    """
    gradient = jax.value_and_grad(make_loss(functional, accumulation), has_aux=True)

    def whole(parameters, batch, total):
        (_, sums), grads = gradient(parameters, batch, total)
        return grads, *sums

    def by_pieces(parameters, batch, total):
        pieces = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

        def add(carry, piece):
            return jax.tree.map(jnp.add, carry, whole(parameters, piece, total)), None

        routing = Window.empty(functional.routing(parameters)).routing
        zeros = jax.tree.map(jnp.zeros_like, parameters), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), routing
        return jax.lax.scan(add, zeros, pieces)[0]

    def step(state: TrainState, batch: dict[str, Any]) -> TrainState:
        count = batch["weights"].sum(dtype=jnp.int32)
        total = jnp.maximum(count, 1).astype(jnp.float32)
        grads, summed, correct, routing = (whole if accumulation == 1 else by_pieces)(state.parameters, batch, total)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(summed) & jnp.isfinite(grad_norm) & (state.failure.step == 0)

        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        window = Window(
            loss=state.window.loss + summed,
            correct=state.window.correct + correct,
            count=state.window.count + count,
            grad_norm=state.window.grad_norm + grad_norm,
            steps=state.window.steps + 1,
            routing=jax.tree.map(jnp.add, state.window.routing, routing),
        )
        new = TrainState(
            parameters=parameters,
            optimizer=optimizer_state,
            step=state.step + 1,
            window=window,
            failure=state.failure,
        )
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        first = ~good & (state.failure.step == 0)
        seen = Failure(step=state.step + 1, loss=summed / total, grad_norm=grad_norm)
        return kept.replace(failure=jax.tree.map(lambda a, b: jnp.where(first, a, b), seen, state.failure))

    return jax.jit(step, donate_argnums=0)
