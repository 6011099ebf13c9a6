"""The programs of a run that compile while its weights are drawn."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

import jax
import jax.numpy as jnp

from ufbert.config import RunConfig
from ufbert.pretrain.schedules import rows_per_step, stage
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import StepInputs, Steps, state_shapes


class Ahead:
    """The evaluation and the first update of a run, which compile side by side while its weights are drawn.

    XLA compiles without the interpreter's lock. What is compiled lies where the calls look for it. On several devices, and for
    an update of several micro-batches, nothing is compiled ahead.
    """

    def __init__(self, run: RunConfig, steps: Steps, layout: Layout, evaluated: tuple[int, int]) -> None:
        """Begin. `evaluated` are the rows and tokens of a held-out batch."""
        self._evaluation, self._update = Future[Any](), Future[Any]()
        for future in (self._evaluation, self._update):
            future.set_result(None)
        if len(layout.devices) > 1 or jax.process_count() > 1:
            return
        shapes, first, pool = state_shapes(run, layout), stage(run, 0.0), ThreadPoolExecutor(2, "compile")
        key = jax.eval_shape(lambda: jax.random.key(0))
        scalar, count = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        if rows_per_step(run.train, 0.0) == run.train.micro_rows:
            rows = jax.ShapeDtypeStruct((run.micro_tokens // first.length, first.length), jnp.int32)
            inputs = cast(Any, StepInputs)(scalar, scalar, scalar, count)
            program = cast(Any, steps.train_step).lower(shapes, rows, key, inputs, next_token=first.next_token)
            self._update = pool.submit(program.compile)
        rows = jax.ShapeDtypeStruct(evaluated, jnp.int32)
        self._evaluation = pool.submit(cast(Any, steps.heldout_sums).lower(shapes.params, rows, key).compile)
        pool.shutdown(wait=False)

    def wait_for_evaluation(self) -> None:
        """Wait until the evaluation is compiled. Raises what its compilation raised."""
        self._evaluation.result()

    def wait_for_update(self, is_over: Callable[[int], bool], step: int) -> bool:
        """Wait until the first update is compiled; False if `is_over`, asked about `step` now and then, said so before."""
        while not wait([self._update], timeout=0.2).done:
            if is_over(step):
                return False
        self._update.result()
        return True
