"""ncnn, converted by pnnx, with float32 storage and arithmetic (its default would be half precision)."""

from __future__ import annotations

import re
import subprocess
import types
from pathlib import Path
from typing import Any

from saevit_tvm.support.errors import ModelError
from saevit_tvm.verbs.peers.base import Answer, Peer, read_example


def pool_windows(module: Any) -> Any:
    """Say SAA's aggregation in four dimensions, as ncnn has no more: a quotient of two average pools.

    The same function of the same weights; without it the model could not be converted at all.
    """
    import torch.nn.functional as F

    from saevit_tvm.models.saevit import SAA

    def aggregate(self: Any, y: Any, rows: int, columns: int) -> Any:
        y = y.permute(0, 3, 1, 2)
        share = self.saliency(y).exp()
        below, right = rows * self.rate - y.shape[2], columns * self.rate - y.shape[3]
        if below or right:
            y, share = (F.pad(part, (0, right, 0, below)) for part in (y, share))
        tokens = F.avg_pool2d(share * y, self.rate) / F.avg_pool2d(share, self.rate)
        return tokens.flatten(2).transpose(1, 2)

    for part in module.modules():
        if isinstance(part, SAA):
            vars(part)["aggregate"] = types.MethodType(aggregate, part)
    return module


class Ncnn(Peer):
    name = "ncnn"
    modules = ("ncnn", "pnnx")
    install = "ncnn pnnx"

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        import pnnx
        import torch

        from saevit_tvm.verbs.peers.pytorch import load_module

        first, *others = read_example(example)
        x = torch.from_numpy(first)
        if others or x.dtype != torch.float32:
            raise ModelError("ncnn is compared on one input of float32 only.")
        if x.shape[0] != 1:
            raise ModelError("ncnn computes one picture at a time; build with --batch 1 to compare with it.")
        work = folder / "pnnx"
        work.mkdir()
        with torch.inference_mode():
            module = pool_windows(load_module(model))
            torch.jit.trace(module, x, check_trace=False).save(str(work / "model.pt"))
        shape = "[" + ",".join(map(str, x.shape)) + "]f32"
        subprocess.run([pnnx.EXEC_PATH, "model.pt", f"inputshape={shape}", "fp16=0"], cwd=work, check=True)
        self._refuse_unconverted(work / "model.ncnn.param")
        for suffix in ("param", "bin"):
            (work / f"model.ncnn.{suffix}").rename(folder / f"model.{suffix}")

    @staticmethod
    def _refuse_unconverted(param: Path) -> None:
        # pnnx exits 0 when it leaves operators as they are, and ncnn then crashes.
        if not param.exists():
            raise ModelError("pnnx wrote no ncnn model.")
        kinds = {line.split()[0] for line in param.read_text().splitlines()[2:] if line.strip()}
        foreign = sorted(kind for kind in kinds if re.match(r"(aten|prim|pnnx|torch|nn|F|Tensor)[.:]", kind))
        if foreign:
            raise ModelError(f"pnnx could not convert {', '.join(foreign)}.")

    def load(self, folder: Path, threads: int) -> Answer:
        import ncnn
        import numpy as np

        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_vulkan_compute = False
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, option, False)
        if net.load_param(str(folder / "model.param")) or net.load_model(str(folder / "model.bin")):
            raise ModelError("ncnn cannot load what pnnx wrote.")
        entry, exits = net.input_names()[0], net.output_names()

        def answer(x):
            with net.create_extractor() as extractor:
                extractor.input(entry, ncnn.Mat(np.ascontiguousarray(x[0])).clone())
                outputs = []
                for name in exits:
                    status, mat = extractor.extract(name)
                    if status:
                        raise ModelError(f"ncnn fails to compute '{name}' (status {status}).")
                    outputs.append(np.array(mat)[None])
                return outputs

        return answer
