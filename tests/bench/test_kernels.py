"""The profile of a training step: a trace as a graphics card leaves it, and the program that ran, make kinds of kernels."""

import pytest
from jax.profiler import ProfileData

from ufbert.bench.training.kernels import KINDS, Kernel, kind_of, profile_report, read_program, read_trace

PROGRAM = """
HloModule jit_train_step, is_scheduled=true

%fused_exp (param_0: f32[4,8]) -> bf16[4,8] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  %exp.1 = f32[4,8]{1,0} exponential(%param_0), metadata={op_name="jit(train_step)/jvp(Encoder)/layer_00/attention/exp"}
  ROOT %convert.1 = bf16[4,8]{1,0} convert(%exp.1), metadata={op_name="jit(train_step)/jvp(Encoder)/layer_00/attention/c"}
}

%fused_transpose (param_0.1: f32[4,8]) -> bf16[8,4] {
  %param_0.1 = f32[4,8]{1,0} parameter(0)
  %convert.2 = bf16[4,8]{1,0} convert(%param_0.1)
  ROOT %transpose.2 = bf16[8,4]{0,1} transpose(%convert.2), dimensions={1,0}, metadata={op_name="jit(train_step)/jvp(E)/t"}
}

ENTRY %main.9 (p: f32[4,8]) -> (f32[4,8], bf16[8,4]) {
  %p = f32[4,8]{1,0} parameter(0)
  %loop_exponential_fusion.3 = bf16[4,8]{1,0} fusion(%p), kind=kLoop, calls=%fused_exp
  %input_transpose_fusion = bf16[8,4]{0,1} fusion(%p), kind=kInput, calls=%fused_transpose
  %custom-call.7.0 = (bf16[4,8]{1,0}, s8[4]{0}) custom-call(%p, %p), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(train_step)/jvp(Encoder)/layer_01/attention/query/dot_general" stack_frame_id=3}
  %custom-call.8 = bf16[4,8]{1,0} custom-call(%p, %p), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(train_step)/transpose(jvp(Encoder))/layer_01/attention/bhqk,bhsk->bhqs/dot_general"}
  %input_reduce_fusion.1 = f32[4]{0} fusion(%p), kind=kInput, calls=%fused_exp, \
metadata={op_name="jit(train_step)/jvp(Encoder)/layer_01/mixer_norm.of_sum/reduce_sum"}
  %loop_add_fusion.4 = f32[4,8]{1,0} fusion(%p), kind=kLoop, calls=%fused_exp, \
metadata={op_name="jit(train_step)/jvp(Encoder)/layer_01/add"}
  %loop_erfc_fusion = f32[4,8]{1,0} fusion(%p), kind=kLoop, calls=%fused_exp, \
metadata={op_name="jit(train_step)/jvp(Encoder)/layer_01/glu/erfc"}
  %wrapped_log = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused_exp, metadata={op_name="jit(train_step)/jvp()/log"}
  ROOT %loop_multiply_fusion.12 = f32[4,8]{1,0} fusion(%p), kind=kLoop, calls=%fused_exp, \
metadata={op_name="jit(train_step)/cond/branch_1_fun/mul"}
}
"""

EVENTS = [
    # (kernel, instruction or "" as in a captured graph, microseconds, kind)
    ("nvjet_hsh_128x256_64x4", "custom-call.7.0", 40, "products"),
    ("nvjet_hsh_128x256_64x4", "", 40, "products"),
    ("nvjet_hsh_64x64_64x4", "custom-call.8", 8, "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "", 6, "attention"),
    ("loop_exponential_fusion_3", "loop_exponential_fusion.3", 5, "attention"),
    ("loop_exponential_fusion_3", "", 5, "attention"),
    ("input_transpose_fusion", "", 7, "copies"),
    ("input_reduce_fusion_1", "", 4, "norms and sums"),
    ("loop_add_fusion_4", "loop_add_fusion.4", 3, "norms and sums"),
    ("loop_erfc_fusion", "", 9, "feedforward"),
    ("wrapped_log", "", 1, "embedding and loss"),
    ("loop_multiply_fusion_12", "", 11, "optimizer"),
    ("MemcpyD2D", "", 2, "copies"),
    ("norm_backward", "", 3, "norms and sums"),
    ("gated_gelu_forward", "", 3, "feedforward"),
    ("token_loss", "", 3, "embedding and loss"),
    ("a_kernel_of_nobody", "", 1, "other"),
]


def space(lines: str) -> bytes:
    """A serialised trace of these lines of text."""
    return ProfileData.text_proto_to_serialized_xspace(lines)


def gpu_trace(events) -> bytes:
    """Two streams' events in turns, and a line that shows the same time again."""
    names = sorted({name for name, *_ in events})
    shown = {0: [], 1: []}
    start = 0
    for i, (name, instruction, microseconds, _) in enumerate(events):
        stats = f'stats {{ metadata_id: 1 str_value: "{instruction}" }}' if instruction else ""
        shown[i % 2].append(
            f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {start} "
            f"duration_ps: {microseconds * 10**6} {stats} }}"
        )
        start += (microseconds + 1) * 10**6
    metadata = "".join(
        f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{name}" }} }}' for i, name in enumerate(names)
    )
    lines = "".join(f'lines {{ name: "Stream #{7 + i}(Compute)" {" ".join(kept)} }}' for i, kept in shown.items())
    again = f'lines {{ name: "XLA Modules" events {{ metadata_id: 1 offset_ps: 0 duration_ps: {start} }} }}'
    stat = 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }'
    host = f'planes {{ name: "/host:CPU" lines {{ name: "python" {shown[0][0]} }} {metadata} {stat} }}'
    return space(f'{host} planes {{ name: "/device:GPU:0" {lines} {again} {metadata} {stat} }}')


def test_every_kernel_of_a_cards_trace_is_of_its_kind():
    kernels = read_trace(gpu_trace(EVENTS))
    program = read_program(PROGRAM)
    kinds = {(kernel.name, kernel.instruction): kind_of(kernel, program.get(kernel.instruction) or program.get(kernel.name))
             for kernel in kernels}  # fmt: skip
    assert kinds == {(name, instruction): kind for name, instruction, _, kind in EVENTS}


def test_the_report_adds_up_the_kernels_of_an_update():
    report = profile_report(read_trace(gpu_trace(EVENTS)), PROGRAM, steps=2)
    microseconds = dict.fromkeys(KINDS, 0.0)
    for _, _, taken, kind in EVENTS:
        microseconds[kind] += taken / 2
    assert {kind: 1e6 * seconds for kind, seconds in report["kinds"].items()} == pytest.approx(microseconds)
    assert 1e6 * report["seconds"] == pytest.approx(sum(taken for _, _, taken, _ in EVENTS) / 2)
    first, second = report["largest"][:2]
    assert first["operation"] == "jit(train_step)/jvp(Encoder)/layer/attention/query/dot_general"
    assert (first["name"], first["kind"], first["times"]) == ("nvjet_hsh_128x256_64x4", "products", 0.5)
    assert second["operation"] == ""


def test_a_cpus_trace_counts_a_kernel_without_those_inside_it():
    stat = 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }'
    op = 'stats { metadata_id: 1 str_value: "%s" }'
    events = (
        f"events {{ metadata_id: 1 offset_ps: 0 duration_ps: 10000000 {op % 'while.1'} }}"
        f"events {{ metadata_id: 2 offset_ps: 1000000 duration_ps: 3000000 {op % 'dot.2'} }}"
        f"events {{ metadata_id: 2 offset_ps: 5000000 duration_ps: 3000000 {op % 'dot.2'} }}"
        "events { metadata_id: 1 offset_ps: 0 duration_ps: 90000000 }"
    )
    names = 'event_metadata { key: 1 value { id: 1 name: "while.1" } } event_metadata { key: 2 value { id: 2 name: "dot.2" } }'
    kernels = read_trace(space(f'planes {{ name: "/host:CPU" lines {{ name: "a thread" {events} }} {names} {stat} }}'))
    assert [(k.instruction, round(1e6 * k.seconds)) for k in kernels] == [("while.1", 4), ("dot.2", 3), ("dot.2", 3)]


def test_products_are_known_without_the_program():
    for name in (
        "sm90_xmma_gemm_bf16bf16_bf16f32",
        "cutlass_80_tensorop",
        "gemm_fusion_dot_3",
        "dot.12",
        "loop_dot_fusion",
    ):
        assert kind_of(Kernel(name, "", 1.0), None) == "products", name
    for name in ("loop_dotted_line", "wrapped_add"):
        assert kind_of(Kernel(name, "", 1.0), None) == "other", name
