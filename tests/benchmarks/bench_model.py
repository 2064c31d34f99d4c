"""The model on packed and on padded events, against a plain nn.TransformerEncoderLayer stack that keeps its weights.

    python tests/benchmarks/bench_model.py                     # on the CPU, and on CUDA where there is one
    python tests/benchmarks/bench_model.py --lengths 128 --long 1024 --steps 1       # a minute, to see it work

Forward and backward pass. All sides have the same sizes, dropout, pooling, classifier and inputs, in training mode:
"plain" pads to the longest stay and takes dropout inside attention too, as nn.TransformerEncoderLayer does; "padded" is
train.py's model called as a notebook calls it, "packed" as training calls it. Rates count real events only. "mixed"
are stays of L, 3/4 L, 1/2 L and 1/4 L events, "equal" ones all have L events (nothing to pad). What a batch costs
before it reaches the model is measured by bench_input.py.
"""

import argparse
import json
import resource
import time

import torch
from common import machine, peak_memory_gb, run_alone, train
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_DIM, STATIC_DIM = 774, 60
SHARES = {"mixed": (1, 3 / 4, 1 / 2, 1 / 4), "equal": (1, 1, 1, 1), "single": (1,)}


class LayerWithWeights(nn.TransformerEncoderLayer):
    """The library's layer, asked for its attention weights, which it otherwise throws away."""

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        x, self.weights = self.self_attn(
            x,
            x,
            x,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            need_weights=True,
            average_attn_weights=False,
        )
        return self.dropout1(x)


class PlainTransformer(nn.Module):
    """The obvious code: padded events through library layers, attention weights (B, 8, L, L) of each kept."""

    def __init__(self, input_dim: int, static_dim: int) -> None:
        super().__init__()
        self.input_projection = nn.Linear(input_dim, 256)
        self.input_norm, self.dropout = nn.LayerNorm(256), nn.Dropout(0.1)
        self.layers = nn.ModuleList(
            LayerWithWeights(256, 8, 512, 0.1, batch_first=True, norm_first=True) for _ in range(4)
        )
        self.final_norm = nn.LayerNorm(256)
        self.query_vector = nn.Parameter(0.02 * torch.randn(1, 1, 256))
        self.attention_pooling = train.AttentionPooling(256, 4)
        self.classifier = nn.Sequential(
            nn.Linear(256 + static_dim, 256),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(128, 1),
        )

    def logits(self, sequences: Tensor, static_features: Tensor, attention_mask: Tensor) -> Tensor:
        positions = train.sinusoidal_positions(torch.arange(sequences.shape[1], device=sequences.device), 256)
        events = self.dropout(self.input_norm(self.input_projection(sequences)) + 0.1 * positions)  # (B, L, D)
        for layer in self.layers:
            events = layer(events, src_key_padding_mask=~attention_mask)
        query = self.query_vector.expand(len(sequences), -1, -1)
        pooled, _ = self.attention_pooling(query, self.final_norm(events), attention_mask)
        return self.classifier(torch.cat([pooled.squeeze(1), static_features], dim=1))


SIDES = ("plain", "padded", "packed")
Model = PlainTransformer | train.ClinicalTransformer


def make_side(side: str) -> Model:
    """Return the fresh model of a side."""
    return (PlainTransformer if side == "plain" else train.ClinicalTransformer)(INPUT_DIM, STATIC_DIM)


def make_batch(shape: str, longest: int, device: str) -> dict[str, Tensor]:
    """Return random stays of the lengths that `shape` names, padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([round(share * longest) for share in SHARES[shape]])
    batch = {
        "sequences": torch.randn(len(lengths), longest, INPUT_DIM, generator=generator),
        "static_features": torch.randn(len(lengths), STATIC_DIM, generator=generator),
        "attention_mask": torch.arange(longest) < lengths[:, None],
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def step(side: str, model: Model, batch: dict[str, Tensor], stays: train.PackedStays, precision: str) -> float:
    """Return the seconds of one forward and backward pass in training mode."""
    device = batch["sequences"].device.type
    started = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        if side == "packed" and isinstance(model, train.ClinicalTransformer):
            logits, _ = model.score_packed(stays.events, stays.static_features, stays.layout)
        else:
            logits = model.logits(**batch)
    F.binary_cross_entropy_with_logits(logits.float(), torch.ones_like(logits, dtype=torch.float32)).backward()
    model.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(
    side: str, shape: str, longest: int, device: str, precision: str, steps: int, memory_limit_gb: float
) -> None:
    """In this process: the fastest of `steps` steps after one to warm up, and peak memory; printed as JSON."""
    if device == "cpu":  # an allocation beyond it fails with an error, where the kernel would kill without a word
        limit = int(memory_limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.manual_seed(0)
    model = make_side(side).to(device).train()
    batch = make_batch(shape, longest, device)
    layout, labels = (
        train.layout_of_mask(batch["attention_mask"]),
        torch.ones(len(batch["sequences"]), 1, device=device),
    )
    stays = train.PackedStays(train.pack(batch["sequences"], layout), batch["static_features"], labels, layout)
    seconds = min([step(side, model, batch, stays, precision) for _ in range(steps + 1)][1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_memory_gb()
    print(json.dumps({"seconds": seconds, "events": int(batch["attention_mask"].sum()), "peak_gb": peak}))


def measure_alone(
    side: str, shape: str, longest: int, device: str, precision: str, options: argparse.Namespace
) -> dict[str, float] | None:
    """The result of `measure` in a process of its own, or None if that ran out of memory."""
    steps = options.steps if shape != "single" else 1  # there it is the memory that is asked for
    limits = ("--threads", options.threads, "--memory-limit-gb", options.memory_limit_gb)
    run = run_alone(__file__, "--one", side, shape, longest, device, precision, "--steps", steps, *limits)
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    words = ("alloc", "out of memory", "MemoryError")
    if run.returncode not in (-9, 137) and not any(word in run.stderr for word in words):
        raise RuntimeError(run.stderr)
    return None


def compare(shape: str, longest: int, device: str, precision: str, options: argparse.Namespace) -> None:
    """All sides on the same batch, taking turns; the fastest round of each is printed."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds if shape != "single" else 1):
        for side in SIDES:
            result = measure_alone(side, shape, longest, device, precision, options)
            if result and (side not in best or result["seconds"] < best[side]["seconds"]):
                best[side] = result
    for side in SIDES:
        place = f"{device:4} {precision}  {shape:6} {longest:6,} events  {side:6}"
        if side not in best:
            limit = f"more than the {options.memory_limit_gb:g} GB given" if device == "cpu" else "more than there is"
            print(f"{place}  out of memory ({limit})")
            continue
        result = best[side]
        rate = result["events"] / result["seconds"]
        ratio = f"{best['plain']['seconds'] / result['seconds']:6.1f} times" if "plain" in best else " " * 12
        print(
            f"{place}  {result['seconds']:8.3f} s  {rate:10,.0f} events/s  {ratio}  peak {result['peak_gb']:5.2f} GB",
            flush=True,
        )


@torch.no_grad()
def compare_devices() -> None:
    """Probabilities of the same weights and stays: CPU in fp32 against CUDA in fp32 and bf16."""
    torch.manual_seed(0)
    model, batch = train.ClinicalTransformer(INPUT_DIM, STATIC_DIM).eval(), make_batch("mixed", 2048, "cpu")
    on_cpu = model(**batch)
    model, batch = model.to("cuda"), {name: tensor.to("cuda") for name, tensor in batch.items()}
    for precision in ("fp32", "bf16"):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            difference = (model(**batch).cpu() - on_cpu).abs().max()
        print(f"probabilities, CPU fp32 against CUDA {precision}: largest difference {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048], help="events of the longest of 4 stays")
    parser.add_argument("--long", type=int, default=8192, help="events of the single stay whose memory is measured")
    parser.add_argument("--long-cuda", type=int, default=16384, help="the same on CUDA")
    parser.add_argument("--steps", type=int, default=3, help="steps after one to warm up; the fastest counts")
    parser.add_argument("--rounds", type=int, default=2, help="the sides take turns, so that a busy machine hits all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--memory-limit-gb", type=float, default=16.0, help="address space of a process on the CPU")
    parser.add_argument(
        "--one",
        nargs=5,
        metavar=("SIDE", "SHAPE", "LONGEST", "DEVICE", "PRECISION"),
        help="measure one side in this process (what the script starts for each)",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        side, shape, longest, device, precision = options.one
        return measure(side, shape, int(longest), device, precision, options.steps, options.memory_limit_gb)
    places = [("cpu", "fp32")] + [("cuda", "fp32"), ("cuda", "bf16")] * torch.cuda.is_available()
    for device, precision in places:
        for longest in options.lengths:
            for shape in ("mixed", "equal"):
                compare(shape, longest, device, precision, options)
        compare("single", options.long if device == "cpu" else options.long_cuda, device, precision, options)
    if torch.cuda.is_available():
        compare_devices()
    print(machine())


if __name__ == "__main__":
    main()
