"""A peer of `ufbert bench encoder`, run by an interpreter that has what it needs: PYTHON encoder_peer.py FOLDER KIND THREADS.

KIND is `onnxruntime` or `onnxruntime-int8` (needs onnxruntime and onnx, and better torch, too), `torch` or `torch-int8` (needs
torch and transformers): the dense BERT of the job folder (`ufbert/bench/encoder_job.py`) in float32, or
with int8 weights as that library rounds them on the fly.

The protocol, the same for every contestant: one JSON line a message. It prints `{"ready": WHAT IT IS}`, or
`{"missing": WHAT IT LACKS}` and ends; then it answers each of

- `{"do": "load", "shape": s}`: get ready for the batches of a shape, `1x128` say; answers their number;
- `{"do": "check", "name": n, "shape": s}`: `{"file": F}`, where the hidden states (b, t, d) of its first batch are;
- `{"do": "time", "name": n, "what": w, "first": i, "calls": c}`: `{"seconds": s}` of c calls on batches i, i + 1, ..., from ids
  to hidden states;

by `{"error": SENTENCE}` if it fails.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def onnx_session(folder: Path, kind: str, threads: int):
    """(what it is, ids to hidden states). Fused by ONNX Runtime's own tool for BERT, where torch, which that needs, is there,
    else by ONNX Runtime alone; quantised by its own tool."""
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
    names = [one.name for one in session.get_inputs()]

    def run(ids):
        wide = ids.astype(np.int64)
        given = {"input_ids": wide, "attention_mask": np.ones_like(wide), "token_type_ids": np.zeros_like(wide)}
        return session.run(["last_hidden_state"], {name: given[name] for name in names})[0]

    return f"onnxruntime {onnxruntime.__version__}, {how}", run


def torch_model(folder: Path, kind: str, threads: int):
    """(what it is, ids to hidden states), by transformers' BertModel."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.BertModel.from_pretrained(folder / "dense-hf", add_pooling_layer=False).eval()
    if kind.endswith("int8"):
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    def run(ids):
        with torch.inference_mode():
            return model(torch.from_numpy(ids.astype(np.int64))).last_hidden_state.numpy()

    return f"torch {torch.__version__}, transformers {transformers.__version__}", run


class Peer:
    """Answers messages."""

    def __init__(self, folder: Path, run):
        self.folder, self.run, self.batches = folder, run, []

    def load(self, shape):
        self.batches = list(np.load(self.folder / f"{shape}.npy"))
        return {"batches": len(self.batches)}

    def check(self, name, shape):
        np.save(self.folder / f"{name}-found.npy", self.run(np.load(self.folder / f"{shape}.npy")[0]))
        return {"file": f"{name}-found.npy"}

    def time(self, name, what, first, calls):
        start = time.perf_counter()
        for i in range(first, first + calls):
            self.run(self.batches[i % len(self.batches)])
        return {"seconds": time.perf_counter() - start}


def main() -> None:
    folder, kind, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        facts, run = (onnx_session if kind.startswith("onnxruntime") else torch_model)(folder, kind, threads)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    peer = Peer(folder, run)
    print(json.dumps({"ready": f"{facts}, {threads} threads"}), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = getattr(peer, message.pop("do"))(**message)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
