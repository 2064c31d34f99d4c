"""Text encoding: one text at a time through LongformerModel, as users have it, against train.py's encoder, in one run.

    python tests/benchmarks/bench_text_encoder.py                              # the sample's lab texts
    python tests/benchmarks/bench_text_encoder.py --data ../mimic-iv-demo        # anything that train.py reads

Base size with Clinical-Longformer's configuration and random weights; a byte-level BPE is trained on the spot to about
the 2.9 characters per token that Clinical-Longformer's own vocabulary gives on lab texts.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from clinical_lf.reading import read_stays  # noqa: E402
from clinical_lf.tables import EVENT_TYPES  # noqa: E402


def lab_texts(path: str | Path, count: int) -> list[str]:
    """Return `count` distinct lab texts, drawn with a fixed seed, so that short and long ones come as they are."""
    with tempfile.TemporaryDirectory() as cache:
        table, _ = read_stays(path, cache)
    is_lab = table.event_type == EVENT_TYPES.index("labevent")
    texts = pd.Series(table.texts[np.unique(table.text[is_lab])])
    return texts.sample(min(count, len(texts)), random_state=0).tolist()


def save_random_longformer(folder: Path, texts: list[str], vocabulary: int) -> None:
    """Write a model folder with Clinical-Longformer's configuration, random weights and a vocabulary of its own."""
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    bpe.save_model(str(folder))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 4098, "type_vocab_size": 1}
    sizes |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    sizes |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
    sizes |= {"attention_window": [512] * 12, "layer_norm_eps": 1e-5}
    config = transformers.LongformerConfig(**sizes)
    transformers.LongformerModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


class OneAtATime:
    """The baseline: tokenise, run and keep the CLS vector of one text after another."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.LongformerModel.from_pretrained(folder).eval().to(device)
        self.vector("warm up")

    @torch.inference_mode()
    def vector(self, text: str) -> np.ndarray:
        inputs = self.tokenizer(text, truncation=True, max_length=512, return_tensors="pt").to(self.device)
        return self.model(**inputs).last_hidden_state[0, 0].float().cpu().numpy()


def ours(folder: Path, dtype: str, cache_dir: Path, device: str) -> train.ClinicalTextEncoder:
    """Return train.py's encoder with its weights loaded and warmed up."""
    encoder = train.ClinicalTextEncoder(folder, cache_dir=cache_dir, dtype=dtype, devices=[device])
    encoder.encode_event_text_batch(["warm up"] * 8)
    return encoder


def cpu_name() -> str:
    """Return the processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(
    baseline: OneAtATime, encoders: dict[str, train.ClinicalTextEncoder], texts: list[str], rounds: int, per_round: int
) -> tuple[dict[str, float], np.ndarray]:
    """Return seconds of the baseline and of each encoder, taking turns, and the baseline's vectors of its few texts."""
    seconds, vectors = dict.fromkeys(["baseline", *encoders], 0.0), []
    for number in range(rounds):
        start = time.perf_counter()
        vectors += [baseline.vector(text) for text in texts[number * per_round :][:per_round]]
        seconds["baseline"] += time.perf_counter() - start
        for dtype, encoder in encoders.items():  # plan, tokenise, encode, write the cache
            start = time.perf_counter()
            encoder.embed(texts[number::rounds], progress=False)
            seconds[dtype] += time.perf_counter() - start
    return seconds, np.array(vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=ROOT / "sample_train.csv", help="anything that train.py --data takes")
    parser.add_argument("--texts", type=int, default=1500, help="distinct texts for our side, over all rounds")
    parser.add_argument("--baseline-texts", type=int, default=30, help="texts for the baseline, over all rounds")
    parser.add_argument("--rounds", type=int, default=3, help="the sides take turns, so that a busy machine hits all")
    parser.add_argument("--vocabulary", type=int, default=700, help="size of the vocabulary trained on the spot")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    texts = lab_texts(options.data, options.texts)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "random_longformer"
        model.mkdir()
        save_random_longformer(model, texts, options.vocabulary)
        lengths = [len(ids) for ids in transformers.AutoTokenizer.from_pretrained(model)(texts)["input_ids"]]
        print(f"{len(texts)} distinct lab texts, {np.median(lengths):.0f} tokens in the median, {max(lengths)} at most")
        baseline = OneAtATime(model, options.device)
        kinds, cache = ("float32", "bfloat16"), Path(scratch)
        encoders = {dtype: ours(model, dtype, cache / dtype, options.device) for dtype in kinds}
        per_round = max(1, options.baseline_texts // options.rounds)
        seconds, vectors = compare(baseline, encoders, texts, options.rounds, per_round)
        rate = len(vectors) / seconds["baseline"]
        print(f"one at a time, LongformerModel, fp32: {rate:7.2f} texts/s ({len(vectors)} texts)")
        for dtype, encoder in encoders.items():
            same = encoder.vectors(texts[: len(vectors)])
            cosine = (same * vectors).sum(1) / np.linalg.norm(same, axis=1) / np.linalg.norm(vectors, axis=1)
            print(
                f"train.py, {dtype:>8}:                  {len(texts) / seconds[dtype]:7.2f} texts/s, "
                f"{len(texts) / seconds[dtype] / rate:.1f} times; largest difference "
                f"{np.abs(same - vectors).max():.1e}, lowest cosine {cosine.min():.5f}"
            )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    place = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else cpu_name()
    print(
        f"{place}, {torch.get_num_threads()} threads, load {load:.1f}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    main()
