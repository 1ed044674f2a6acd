"""Each engine in bf16 on GPUs, against one process without an engine, and DeepSpeed's offload to CPU memory."""

import numpy as np
import pytest
import torch
from launcher import launch

GPU = {"use_cpu": False, "bf16": True, "save_strategy": "no"}
LORA = {"lora": True, "learning_rate": 0.01}
JOINT = {"train_weak": True, "mixing_lambda": 0.4}
KINDS = {
    "frozen": {},
    "lora": LORA,
    "joint": JOINT,
    "joint-lora": LORA | JOINT,
    "cached": {"weak_cache": "hidden"},
    "checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True},
}
ENGINES = ["ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]


def on_gpus(count, mark):
    lacking = pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA device(s)")
    return pytest.param(count, marks=[mark, lacking])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("processes", [on_gpus(1, pytest.mark.gpu), on_gpus(2, pytest.mark.multi_gpu)])
def test_engine(tmp_path, engine, processes):
    runs = [GPU | options | {"output_dir": str(tmp_path / engine / kind)} for kind, options in KINDS.items()]
    batch = {"per_device_train_batch_size": 4}
    singles = launch(tmp_path, "one", [run | batch for run in runs], environment={"CUDA_VISIBLE_DEVICES": "0"})
    batch = {"per_device_train_batch_size": 4 // processes}
    results = launch(tmp_path, engine, [run | batch for run in runs], processes, "bf16")
    for kind, ranks, (single,) in zip(KINDS, results, singles, strict=True):
        for ours in ranks:  # bf16 rounds at other places; its draws differ, so only losses of phase 1 are compared
            np.testing.assert_allclose(ours["loss"][:9], single["loss"][:9], rtol=2e-2, err_msg=kind)
            assert np.isfinite(ours["loss"]).all()
            assert len(ours["mixed_nll"]) == len(single["mixed_nll"]) > 0
            np.testing.assert_allclose(ours["weak_entropy"], single["weak_entropy"], rtol=1e-2, err_msg=kind)
            np.testing.assert_array_equal(ours["weights"], ranks[0]["weights"], err_msg=kind)
