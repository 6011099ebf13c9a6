"""XLA's counts of the compiled training step: operations, bytes moved, memory held. Nothing is allocated or run."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from ufbert.config import RunConfig, TreeBackend
from ufbert.data.tokenizer import SpecialIds
from ufbert.pretrain.step import StepInputs, build_steps, init_state


class StepCount(NamedTuple):
    """One compiled function, as XLA's `cost_analysis` and `memory_analysis` describe it."""

    flops: float
    """Floating-point operations; a multiply-add counts two."""
    bytes: float
    """Bytes that its instructions read and write, after fusion."""
    memory: float
    """Bytes held while it runs: arguments, results that share no argument's buffer, and temporaries."""
    compile_seconds: float
    """Seconds that tracing and compiling took here."""


class RunCounts(NamedTuple):
    """The counts of a run's functions."""

    gradient: dict[tuple[int, int], StepCount]
    """By (packed rows, tokens of a piece): one micro-batch's gradient, added to the total."""
    finish: StepCount
    """The optimizer's update from an accumulated gradient."""
    evaluate: StepCount
    """One held-out micro-batch."""
    optimizer_bytes: float
    """Bytes of the optimizer's state, which stay on the device while gradients are computed."""
    state_bytes: float
    """Bytes of the whole training state: what a checkpoint holds."""

    @property
    def compile_seconds(self) -> float:
        """Seconds to compile what a run compiles: one gradient a piece length, finish, update (about both) and evaluate."""
        largest = max(rows for rows, _ in self.gradient)
        gradients = sum(count.compile_seconds for (rows, _), count in self.gradient.items() if rows == largest)
        return 2 * (gradients + self.finish.compile_seconds) + self.evaluate.compile_seconds

    def memory(self, micro_rows: int) -> float:
        """Bytes on the device while training with this micro-batch.

        Activations grow with the rows and nothing else does, so other sizes lie on the line through the two that were
        compiled. The optimizer's state waits beside the gradient; an update needs no activations.
        """
        lengths = {length for _, length in self.gradient}
        found = [self.finish.memory]
        for length in lengths:
            sizes = sorted(rows for rows, n in self.gradient if n == length)
            low, high = self.gradient[sizes[0], length].memory, self.gradient[sizes[-1], length].memory
            slope = (high - low) / max(1, sizes[-1] - sizes[0])
            found.append(high + slope * (micro_rows - sizes[-1]) + self.optimizer_bytes)
        return max(found)


def count_run(run: RunConfig, show: Callable[[str], None] = lambda text: None) -> RunCounts:
    """Compile the functions of `run` for the default backend, at its micro-batch and at half of it, and count."""
    rows, seq_len = run.train.micro_rows, run.data.seq_len
    lengths = [seq_len, *([run.data.short_len] if run.data.short_until > 0 else [])]
    sizes = [rows, rows // 2] if rows > 1 else [1, 2]
    gradient = {}
    for size in sizes:
        for length in lengths:
            show(f"compiling the gradient of {size} rows of {seq_len} tokens in pieces of {length}")
            gradient[size, length] = count_step(run, "gradient", size, length)
    show("compiling the update and the evaluation")
    finish, evaluate = count_step(run, "finish", rows, seq_len), count_step(run, "evaluate", rows, seq_len)
    optimizer, state = _state_bytes(run)
    return RunCounts(gradient, finish, evaluate, optimizer, state)


def count_step(run: RunConfig, part: str, rows: int, length: int) -> StepCount:
    """The counts of one function, compiled for the default backend; arguments as in `lowered_step`."""
    began = time.perf_counter()
    compiled = lowered_step(run, part, rows, length).compile()
    seconds = time.perf_counter() - began
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    held = 0.0
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        held -= memory.alias_size_in_bytes
    return StepCount(float(cost.get("flops", 0.0)), float(cost.get("bytes accessed", 0.0)), float(held), seconds)


def lowered_step(run: RunConfig, part: str, rows: int, length: int) -> Any:
    """`gradient`, `finish`, `step` or `evaluate` of `run`, lowered from shapes: `rows` packed rows in pieces of `length`.

    The only place in planning that knows the arguments of the step functions, beside `real_update`.
    """
    import jax
    import jax.numpy as jnp

    steps: Any = build_steps(run, _special())
    state = _state_shapes(run)
    key = jax.eval_shape(jax.random.key, 0)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    inputs = StepInputs(number, number, number, count)
    batch = jax.ShapeDtypeStruct((rows * run.data.seq_len // length, length), jnp.int32)
    if part == "evaluate":
        return steps.heldout_sums.lower(state.params, batch, key)
    if part == "step":
        return steps.train_step.lower(state, batch, key, inputs)
    total = jax.eval_shape(steps.add_gradient, state.params, batch, key, inputs, None)
    if part == "finish":
        return steps.apply_gradient.lower(state, total, inputs)
    return steps.add_gradient.lower(state.params, batch, key, inputs, total)


def real_update(run: RunConfig, rows: int) -> Callable[[], None]:
    """A function that trains one update on `rows` random packed rows through the real step, and waits for it. Compiled."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    special = _special()
    steps = build_steps(run, special)
    held = [init_state(run, jax.random.key(0))]
    batch = np.random.default_rng(0).integers(5, run.model.vocab_size, (rows, run.data.seq_len)).astype(np.int32)
    batch[:, 0] = special.cls

    inputs = StepInputs(
        jnp.float32(run.train.peak_lr * 0.25), jnp.float32(0.0), jnp.float32(run.train.mask_rate[0]), jnp.int32(rows)
    )

    def update() -> None:
        key = jax.random.fold_in(jax.random.key(1), int(held[0].step))
        held[0], metrics = steps.train_step(held[0], batch, key, inputs)
        jax.block_until_ready(metrics)

    update()
    return update


def planned_model(run: RunConfig, *, dtype: str, trees: TreeBackend) -> RunConfig:
    """`run` with every `auto` of its model decided for the planned device, which may not be the one that compiles."""
    model = run.model
    return replace(
        run,
        model=replace(
            model,
            dtype=dtype if model.dtype == "auto" else model.dtype,
            tree_backend=trees if model.tree_backend == "auto" else model.tree_backend,
        ),
    )


def _special() -> Any:
    """Any special ids do: neither arithmetic nor memory depends on them."""

    return SpecialIds(0, 1, 2, 3, 4)


def _state_shapes(run: RunConfig) -> Any:
    import jax

    return jax.eval_shape(lambda key: init_state(run, key), jax.eval_shape(jax.random.key, 0))


def _state_bytes(run: RunConfig) -> tuple[float, float]:
    """(bytes of the optimizer's state, bytes of the whole training state)."""
    import jax

    state = _state_shapes(run)

    def size(tree: Any) -> float:
        return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))

    return size(state.opt_state), size(state)
