"""The paths of a GPU box, on a pretended cuda device (a file beside the checkout) and in several processes.

`python tests/test_devices.py packed_input` runs one scenario; that file has more of them.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRETENDED = ROOT.parent / "shared" / "pretended_cuda" / "test_pretended_cuda.py"
PATHS = [str(ROOT), str(ROOT / "tests")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "REPO": str(ROOT), "PYTHONPATH": os.pathsep.join(PATHS)}
TWO_OF = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # of a script

if __name__ == "__main__":  # the library of the pretended machine must be loaded before torch
    sys.path[:0] = [*PATHS, str(PRETENDED.parent)]
    import test_pretended_cuda as pretended

    pretended.LIBRARY = ctypes.CDLL(pretended.build())

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from conftest import save_tokenizer  # noqa: E402
from make_sample import make_sample  # noqa: E402
from small_table import padded_logits  # noqa: E402
from torch import distributed, futures  # noqa: E402

import train  # noqa: E402
from clinical_lf import plan  # noqa: E402


def small_settings(**changes):
    """Settings of a training that takes seconds, on a small sample written to the working folder."""
    if not Path("data.csv").exists():
        make_sample(70, seed=1).table.to_csv("data.csv", index=False)
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_pooling_heads": 2, "max_epochs": 1, "batch_size": 4}
    options = {"data": "data.csv", "text_encoder": "hashing", "cache_dir": "cache", "save_attention_every": 0}
    return train.Settings(**(sizes | options | {"output_dir": "out", "mixed_precision": "no"} | changes))


def packed_input(machine):
    """At most two waits a step, wherever the vectors live; the same logits as the padded path on the CPU."""
    for place, where in ((train.place_vectors, "cuda"), (lambda vectors, device: torch.from_numpy(vectors), "cpu")):
        train.place_vectors = place
        trainer, checkpoint = train.train_model(small_settings())
        assert trainer.train_set.device.type == where
        n_steps = len(trainer.plan_epoch(1))
        machine.reset()
        trainer.train_epoch(1)
        waits = sum(count for name, count in machine.counts().items() if name.startswith("SYNC"))
        assert waits <= 2 * n_steps, waits / n_steps
        found = train.predict_logits(checkpoint.model, trainer.test_set, checkpoint.settings, trainer.accelerator)
        on_cpu = train.load_checkpoint("out/checkpoints/best_model.pth")
        vectors = trainer.test_set.text_vectors.cpu()
        dataset = train.ClinicalSequenceDataset(trainer.test_set.table, on_cpu.preprocessor, vectors)
        assert np.allclose(found, padded_logits(on_cpu.model, dataset), atol=1e-4)


def another_encoder(machine):
    """An encoder that is no Longformer (here RoBERTa), on the device in fp32 and bf16, against the CPU."""
    folder = Path("roberta")
    folder.mkdir()
    save_tokenizer(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 514}
    transformers.RobertaModel(transformers.RobertaConfig(**sizes, initializer_range=0.2)).save_pretrained(folder)
    texts = [f"Lab: Lactate | Value: {i} mmol/L" + " and so on" * (i % 40) for i in range(40)] + [""]
    ways = {"cpu": {"devices": ["cpu"], "dtype": "float32"}, "cuda": {"dtype": "float32"}, "bf16": {}}
    encoders = {way: train.ClinicalTextEncoder(folder, cache_dir=Path(way), **ways[way]) for way in ways}
    found = {way: encoder.encode_event_text_batch(texts) for way, encoder in encoders.items()}
    assert abs(found["cuda"] - found["cpu"]).max() < 1e-4
    norms = np.linalg.norm(found["bf16"], axis=1) * np.linalg.norm(found["cpu"], axis=1)
    assert ((found["bf16"] * found["cpu"]).sum(1) / norms).min() > 0.99


def join_processes():
    """Join the launcher's processes. Gloo knows no pretended tensors: what it sends goes to the host and back."""
    from torch._C._distributed_c10d import _create_work_from_future

    class ThroughHost(distributed.ProcessGroup):
        def __init__(self, store, rank, size, timeout):
            super().__init__(rank, size)
            self.gloo = distributed.ProcessGroupGloo(store, rank, size, timeout)

        def _on_host(self, collective, tensors, options):
            there = [tensor.cpu() for tensor in tensors]
            collective(there, options).wait()
            for tensor, result in zip(tensors, there):
                tensor.copy_(result)
            future = futures.Future()
            future.set_result(tensors)
            return _create_work_from_future(future)

        def allgather(self, outputs, tensors, options):
            gather = lambda there, options: self.gloo.allgather([there], [tensors[0].cpu()], options)
            return self._on_host(gather, outputs[0], options)

        allreduce = lambda self, tensors, options: self._on_host(self.gloo.allreduce, tensors, options)
        broadcast = lambda self, tensors, options: self._on_host(self.gloo.broadcast, tensors, options)
        barrier = lambda self, opts: self.gloo.barrier(opts)

    distributed.Logger.set_runtime_stats_and_log = lambda logger: None  # it asks CUDA for the time
    distributed.Backend.register_backend("through_host", ThroughHost, devices=["cpu", "cuda"])
    distributed.init_process_group("through_host")


def two_processes(machine):
    """Each on a device of its own, they take the steps that one process takes; the first saves attention meanwhile."""
    machine.n_devices = 2
    rank = os.environ.get("LOCAL_RANK")
    if rank:
        join_processes()
    changes = {"output_dir": "two" if rank else "one", "max_epochs": 2, "dropout": 0.0, "save_attention_every": 5}
    trainer, _ = train.train_model(small_settings(**changes))
    assert str(trainer.train_set.device) == f"cuda:{rank or 0}"
    if not rank:
        subprocess.run([*TWO_OF, __file__, "two_processes", os.getcwd()], check=True, env=ENVIRONMENT)
        one, two = (pd.read_csv(Path(name) / "history.csv").drop(columns="seconds") for name in ("one", "two"))
        pd.testing.assert_frame_equal(one, two, rtol=1e-4)
        files = [sorted(path.name for path in Path(name, "attention_weights").iterdir()) for name in ("one", "two")]
        assert files[0] == files[1]


SCENARIOS = {scenario.__name__: scenario for scenario in (packed_input, another_encoder, two_processes)}


@pytest.mark.slow
@pytest.mark.skipif(not PRETENDED.exists(), reason="no pretended device beside the checkout")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pretended_device(scenario):
    done = subprocess.run([sys.executable, __file__, scenario], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-2500:]


@pytest.mark.slow
@pytest.mark.parametrize("timeout_s, work_s", [("600", "5"), ("2", "60")])
def test_processes_wait_for_the_first_as_long_as_the_timeout_says(timeout_s, work_s):
    command = [*TWO_OF, ROOT / "tests" / "processes" / "waiting.py", timeout_s, work_s]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (done.returncode == 0) == (timeout_s == "600"), done.stderr[-2500:]


def test_default_timeout_outlasts_days_of_encoding(monkeypatch):
    handlers = {}
    monkeypatch.setattr(plan, "Accelerator", lambda **options: handlers.update(options))
    plan.make_accelerator()
    assert [one.timeout for one in handlers["kwargs_handlers"] if hasattr(one, "timeout")] == [timedelta(days=7)]


def test_apple_gpus_are_left_alone_with_a_sentence(monkeypatch, log):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert plan.only_cpu() and "float64" in log.text


@pytest.mark.parametrize("device, free, moves", [("cuda", 1000, True), ("cuda", 900, False), ("cpu", 1000, False)])
def test_vectors_live_on_a_gpu_where_they_take_less_than_half_of_its_free_memory(device, free, moves, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10_000))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: "moved")
    vectors = train.place_vectors(np.zeros((12, 10), np.float32), torch.device(device))  # 480 bytes
    assert isinstance(vectors, str) == moves


WITHOUT_KERNEL = [((7, 5), 32, "float16"), ((9, 0), 12, "bfloat16"), ((9, 0), 264, "bfloat16"), ((9, 0), 32, "float32")]


@pytest.mark.parametrize("capability, width, dtype", [((8, 0), 32, "bfloat16"), *WITHOUT_KERNEL])
def test_variable_length_kernel_is_taken_where_it_runs(capability, width, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    query = SimpleNamespace(is_cuda=True, dtype=getattr(torch, dtype), shape=(9, 4, width), device="cuda")
    assert train.has_variable_length_kernel(query) == ((capability, width, dtype) not in WITHOUT_KERNEL)


if __name__ == "__main__":
    pretended.torch = torch
    torch.set_num_threads(1)
    MACHINE = pretended.Machine()
    with tempfile.TemporaryDirectory() as SCRATCH:
        os.chdir(sys.argv[2] if sys.argv[2:] else SCRATCH)
        SCENARIOS[sys.argv[1]](MACHINE)
        os.chdir("/")
