"""Placement of arrays: on one device, or on all devices of all processes side by side.

On several devices a micro-batch is split by rows, and parameters are copied to each or, with `train.shard_params`, split
among them. The step functions are the same: XLA divides the work by where their inputs lie.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ufbert.config import RunConfig
from ufbert.errors import UserError


class Layout:
    """The placement of a run's arrays. Raises UserError if micro_rows cannot be split evenly."""

    def __init__(self, run: RunConfig, devices: list[jax.Device] | None = None) -> None:
        self.devices = jax.devices() if devices is None else devices
        self._split_params, n = run.train.shard_params, len(self.devices)
        if run.train.micro_rows % n:
            raise UserError(f"train.micro_rows {run.train.micro_rows} cannot be split evenly among {n} devices.")
        self._mesh = (
            jax.make_mesh((n,), ("devices",), axis_types=(AxisType.Auto,), devices=self.devices) if n > 1 else None
        )

    def rows(self, rows: np.ndarray) -> jax.Array | np.ndarray:
        """Split rows (b, t) among the devices; on one device they stay as they are."""
        if self._mesh is None:
            return rows
        split = self._named(PartitionSpec("devices"))
        return jax.make_array_from_callback(rows.shape, split, lambda part: rows[part])

    def sharding(self, leaf: Any) -> Sharding:
        """Place an array of the training state; all that `leaf` needs is a shape."""
        if self._mesh is None:
            return SingleDeviceSharding(self.devices[0])
        axes: list[str | None] = [None] * len(leaf.shape)
        fitting = [i for i, size in enumerate(leaf.shape) if size % len(self.devices) == 0 and size > 0]
        if self._split_params and fitting:
            axes[max(fitting, key=lambda i: leaf.shape[i])] = "devices"
        return self._named(PartitionSpec(*axes))

    def abstract(self, tree: Any) -> Any:
        """Return shapes with their places, for restoring."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding(leaf)), tree
        )

    def constrained(self, tree: Any) -> Any:
        """Bind arrays to their places inside a jitted function."""
        if self._mesh is None:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.sharding(leaf)), tree)

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        assert self._mesh is not None
        return NamedSharding(self._mesh, spec)
