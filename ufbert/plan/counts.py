"""XLA's counts of the compiled training step: operations, bytes moved, memory held. Nothing is allocated or run."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ufbert.config import RunConfig, TreeBackend
from ufbert.cost.flops import ngram_width, train_bytes_per_token, train_flops_per_token
from ufbert.data.tokenizer import SpecialIds
from ufbert.ops import native
from ufbert.pretrain.schedules import Stage, stage, stages
from ufbert.pretrain.step import StepInputs, build_steps, init_state

SPECIAL = SpecialIds(0, 1, 2, 3, 4)
"""Any special ids do: neither arithmetic nor memory depends on them."""
WHOLE_TABLES = {"gradient": 3, "step": 3, "evaluate": 1}
"""Times that XLA counts all rows of a hashed table where a function looks up or updates one row for each token."""


class StepCount(NamedTuple):
    """One compiled function, as XLA's `cost_analysis` and `memory_analysis` describe it."""

    flops: float
    """Floating-point operations; a multiply-add counts two."""
    bytes: float
    """Bytes that its instructions read and write, after fusion; of hashed tables only the rows that tokens read. Analytic where
    a compiler cannot count them (see `moved_bytes`)."""
    memory: float
    """Bytes held while it runs: arguments, results that share no argument's buffer, and temporaries."""
    compile_seconds: float
    """Seconds that tracing and compiling took here."""


class RunCounts(NamedTuple):
    """The counts of a run's functions."""

    gradient: dict[tuple[int, Stage], StepCount]
    """By packed rows and stage: one micro-batch's gradient, added to the total."""
    finish: StepCount
    """The optimizer's update from an accumulated gradient."""
    evaluate: StepCount
    """One held-out micro-batch."""
    optimizer_bytes: float
    """Bytes of the optimizer's state, which stay on the device while gradients are computed."""
    state_bytes: float
    """Bytes of the whole training state, which a checkpoint holds."""

    @property
    def compile_seconds(self) -> float:
        """Add up the seconds to compile a run: one gradient a stage, finish, update (about both) and evaluate."""
        largest = max(rows for rows, _ in self.gradient)
        gradients = sum(count.compile_seconds for (rows, _), count in self.gradient.items() if rows == largest)
        return 2 * (gradients + self.finish.compile_seconds) + self.evaluate.compile_seconds

    def memory(self, micro_rows: int, share: float = 1.0) -> float:
        """Return the bytes on the device while training with this micro-batch.

        Activations grow with the rows and nothing else does, so other sizes lie on the line through the two that were
        compiled. The optimizer's state waits beside the gradient; an update needs no activations. A device for which the
        program was not compiled holds `share` of the activations.
        """
        fixed = 2 * self.state_bytes - self.optimizer_bytes  # and a gradient as large as the weights
        held = [self.finish.memory]
        for at in {at for _, at in self.gradient}:
            sizes = sorted(rows for rows, other in self.gradient if other == at)
            low, high = self.gradient[sizes[0], at].memory, self.gradient[sizes[-1], at].memory
            slope = (high - low) / max(1, sizes[-1] - sizes[0])
            counted = high + slope * (micro_rows - sizes[-1]) + self.optimizer_bytes
            held.append(counted - (1.0 - share) * max(0.0, counted - fixed))
        return max(held)


def count_run(run: RunConfig, show: Callable[[str], None] = lambda text: None) -> RunCounts:
    """Compile the functions of `run` for the default backend, at its micro-batch and at half of it, and count."""
    planned, run = run, compiled_for_cpu(run) if jax.default_backend() == "cpu" else run
    rows, seq_len = run.train.micro_rows, run.data.seq_len
    sizes = [rows, rows // 2] if rows > 1 else [1, 2]
    gradient = {}
    for size in sizes:
        for at in dict.fromkeys([*stages(run), stage(run, 1.0)]):  # a plan counts the last, though it may never come
            what = "next" if at.next_token else "masked"
            show(f"compiling the gradient of {what} tokens, {size} rows of {seq_len} in pieces of {at.length}")
            gradient[size, at] = count_step(run, "gradient", size, at.length, at.next_token)
    show("compiling the update and the evaluation")
    finish, evaluate = count_step(run, "finish", rows, seq_len), count_step(run, "evaluate", rows, seq_len)
    optimizer, state = _state_bytes(run)
    by_kernels = analytic_bytes(planned) - analytic_bytes(run)
    for (size, at), count in gradient.items():
        gradient[size, at] = count._replace(bytes=count.bytes + size * seq_len * by_kernels)
    return RunCounts(gradient, finish, evaluate, optimizer, state)


def compiled_for_cpu(run: RunConfig) -> RunConfig:
    """Return `run` as a CPU can compile it: native kernels, or gather without a compiler, stand in for those of GPUs."""
    if run.model.tree_backend != "pallas":
        return run
    return replace(run, model=replace(run.model, tree_backend="gather" if native.unavailable() else "native"))


def analytic_bytes(run: RunConfig) -> float:
    """Return the bytes that a micro-batch's gradient moves for a token, about, for a planned model."""
    assert run.model.tree_backend != "auto"
    return train_bytes_per_token(run, trees=run.model.tree_backend, bfloat16=run.model.dtype == "bfloat16")


def moved_bytes(run: RunConfig, part: str, rows: int, counted: float, on_cpu: bool) -> float:
    """Return the bytes that a function moves, of which its compiler has `counted` so many.

    A compiler counts all rows of hashed tables, of which tokens read few. An accelerator's sees none of the bytes that kernels
    of ours move, so the analytic count takes its place there.
    """
    if part in ("gradient", "step") and not on_cpu:
        return rows * run.data.seq_len * analytic_bytes(run)
    if part in WHOLE_TABLES:
        unread = run.model.ngram_rows - rows * run.data.seq_len
        counted -= WHOLE_TABLES[part] * 4.0 * ngram_width(run.model) * unread
    return counted


def count_step(run: RunConfig, part: str, rows: int, length: int, next_token: bool = False) -> StepCount:
    """Count one function, compiled for the default backend; arguments as in `lowered_step`."""
    began = time.perf_counter()
    compiled = lowered_step(run, part, rows, length, next_token).compile()
    seconds = time.perf_counter() - began
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    counted, on_cpu = float(cost.get("bytes accessed", 0.0)), jax.default_backend() == "cpu"
    moved = moved_bytes(run, part, rows, counted, on_cpu)
    held = 0.0
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        held -= memory.alias_size_in_bytes
    return StepCount(float(cost.get("flops", 0.0)), moved, float(held), seconds)


def lowered_step(run: RunConfig, part: str, rows: int, length: int, next_token: bool = False) -> Any:
    """Lower `gradient`, `finish`, `step` or `evaluate` of `run` from shapes: `rows` packed rows in pieces of `length`."""
    steps: Any = build_steps(run, SPECIAL)
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
    return steps.add_gradient.lower(state.params, batch, key, inputs, total, next_token=next_token)


def real_update(run: RunConfig, rows: int) -> Callable[[], None]:
    """Return a compiled function that trains one update on `rows` random packed rows by the real step, and waits for it."""
    steps, state = build_steps(run, SPECIAL), init_state(run, jax.random.key(0))
    batch = np.random.default_rng(0).integers(5, run.model.vocab_size, (rows, run.data.seq_len)).astype(np.int32)
    batch[:, 0] = SPECIAL.cls
    lr, mask_rate = jnp.float32(run.train.peak_lr * 0.25), jnp.float32(run.train.mask_rate[0])
    inputs = StepInputs(lr, jnp.float32(0.0), mask_rate, jnp.int32(rows))

    def update() -> None:
        nonlocal state
        key = jax.random.fold_in(jax.random.key(1), int(state.step))
        state, metrics = steps.train_step(state, batch, key, inputs)
        jax.block_until_ready(metrics)

    update()
    return update


def planned_model(run: RunConfig, *, dtype: str, trees: TreeBackend) -> RunConfig:
    """Decide every `auto` of the model for the planned device, which may not be the one that compiles."""
    dtype = dtype if run.model.dtype == "auto" else run.model.dtype
    trees = trees if run.model.tree_backend == "auto" else run.model.tree_backend
    return replace(run, model=replace(run.model, dtype=dtype, tree_backend=trees))


def planned_flops(run: RunConfig) -> float:
    """Count the operations of training, per token of a packed row, by the tree backend that `planned_model` has decided."""
    return train_flops_per_token(run, masked_trees=run.model.tree_backend == "masked")


def _state_shapes(run: RunConfig) -> Any:
    return jax.eval_shape(lambda key: init_state(run, key), jax.eval_shape(jax.random.key, 0))


def state_bytes(run: RunConfig) -> float:
    """Return the bytes of the whole training state of `run`, without compiling or allocating anything."""
    return _state_bytes(run)[1]


def _state_bytes(run: RunConfig) -> tuple[float, float]:
    """Return the bytes of the optimizer's state, and of the whole training state."""
    state = _state_shapes(run)

    def size(tree: Any) -> float:
        return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))

    return size(state.opt_state), size(state)
