"""The peers of `ufbert bench encoder`: the dense BERT of the job folder (`encoder_job.py`) by other libraries.

Of ufbert it imports only `worker.py`, from the same folder. Its name is `onnxruntime` or `onnxruntime-int8` (needs
onnxruntime and onnx, and better torch, too), `openvino` or `openvino-int8` (needs openvino, and for int8 nncf), `torch`
or `torch-int8` (needs torch and transformers): float32, or int8 weights. ONNX Runtime and PyTorch round rows when they are
computed, OpenVINO by steps that NNCF has fixed on ids of the job.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from worker import Answers, Worker, serve

Run = Callable[[np.ndarray], np.ndarray]
"""Ids (b, t) -> hidden states (b, t, d)."""


def onnx_session(folder: Path, kind: str, threads: int) -> tuple[str, Run]:
    """Return facts, and BERT in ONNX Runtime, quantised by its own tool, and fused by its own if torch is installed."""
    import onnxruntime

    path, source = folder / f"{kind}.onnx", folder / "dense-onnx" / "model.onnx"
    config = json.loads((folder / "dense-hf" / "config.json").read_text())
    try:
        from onnxruntime.transformers import optimizer

        sizes = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
        fused = optimizer.optimize_model(str(source), "bert", **sizes)
        fused.save_model_to_file(str(path))
        how = f"{sum(fused.get_fused_operator_statistics().values())} operators fused by its tool for BERT"
    except ImportError:
        path.write_bytes(source.read_bytes())
        how = "without its tool for BERT, which needs torch"
    if kind.endswith("int8"):
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        floats = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # which it cannot infer behind fused operators
        quantize_dynamic(path, path, weight_type=QuantType.QInt8, extra_options=floats)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]

    def run(ids: np.ndarray) -> np.ndarray:
        wide = ids.astype(np.int64)
        given = {"input_ids": wide, "attention_mask": np.ones_like(wide), "token_type_ids": np.zeros_like(wide)}
        return session.run(["last_hidden_state"], {name: given[name] for name in names})[0]

    return f"onnxruntime {onnxruntime.__version__}, {how}", run


def static_int8(folder: Path, model: Any, inputs: Callable[[np.ndarray], dict[str, np.ndarray]]) -> Any:
    """Return a model of OpenVINO with weights and activations in int8, by NNCF's recipe for transformers."""
    import nncf

    rows = [np.load(path)[:16] for path in sorted(folder.glob("*x*.npy")) if "result" not in path.name]
    dataset = nncf.Dataset([row[None] for batch in rows for row in batch], inputs)
    return nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=64)


def openvino_model(folder: Path, kind: str, threads: int) -> tuple[str, Run]:
    """Return facts, and BERT in OpenVINO. int8 is NNCF's static quantisation for transformers, calibrated on ids of the job."""
    import openvino

    core = openvino.Core()
    model = core.read_model(folder / "dense-onnx" / "model.onnx")
    names = [tensor.any_name for tensor in model.inputs]
    settings: dict[str, object] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

    def inputs(ids: np.ndarray) -> dict[str, np.ndarray]:
        wide = ids.astype(np.int64)
        given = {"input_ids": wide, "attention_mask": np.ones_like(wide), "token_type_ids": np.zeros_like(wide)}
        return {name: given[name] for name in names}

    how = ""
    if kind.endswith("int8"):
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # standard output is for answers, and NNCF draws its progress there
            model = static_int8(folder, model, inputs)
        how = ", quantised by NNCF"
    else:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    output = next(i for i, tensor in enumerate(model.outputs) if "last_hidden_state" in tensor.names)
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(ids: np.ndarray) -> np.ndarray:
        request.infer(inputs(ids), share_inputs=True)
        return request.get_output_tensor(output).data.copy()

    return f"openvino {openvino.__version__}{how}", run


def torch_model(folder: Path, kind: str, threads: int) -> tuple[str, Run]:
    """Return facts, and BERT in PyTorch, by transformers' BertModel."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.BertModel.from_pretrained(folder / "dense-hf", add_pooling_layer=False).eval()
    if kind.endswith("int8"):
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids.astype(np.int64))).last_hidden_state.numpy()

    return f"torch {torch.__version__}, transformers {transformers.__version__}", run


def start(folder: Path, name: str, threads: int) -> tuple[str, Answers]:
    """Get ready: facts, and the answers of this process."""
    loads = {"onnxruntime": onnx_session, "openvino": openvino_model, "torch": torch_model}
    load = loads[name.removesuffix("-int8")]
    facts, run = load(folder, name, threads)
    worker = Worker(folder, {name: {"call": lambda i, ids: run(ids)}})
    return facts, worker.answers()


if __name__ == "__main__":
    serve(start)
