"""C++ kernels for CPUs, callable inside jitted functions. `kernels.h` says what they compute."""

from ufbert.ops.native.calls import (
    ACTIVATIONS,
    TYPES,
    Packed,
    Quantized,
    Weights,
    add,
    attention,
    instruction_set,
    layer_norm,
    leaf_forward,
    linear,
    pack,
    pack_rounded,
    quantize,
    restore,
    routed_forward,
    tree_backward,
    tree_forward,
    tree_forward_saving,
    unavailable,
)
