"""Puts the repository root on the path, so that tests import the two scripts as a notebook would."""

import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent):
    sys.path.insert(0, str(folder))


def save_tokenizer(folder):
    """A byte-level BPE in the manner of Longformer; capitals stay one token each, since no merge ever saw one."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LongformerTokenizer

    texts = ["lab: lactate (blood, blood gas) | value: 4.1 mmol/l | level: above range", "ingredient: dextrose 5%"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    bpe.save_model(str(folder))
    LongformerTokenizer.from_pretrained(folder).save_pretrained(folder)


def save_longformer(folder, seed=0, attention_window=(512, 512)):
    """A random Longformer with hidden size 32 and its tokenizer, as save_pretrained writes them; returns the folder."""
    import torch
    from transformers import LongformerConfig, LongformerModel

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    config = LongformerConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attention_window=list(attention_window),
        max_position_embeddings=1040,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        sep_token_id=2,
        initializer_range=0.2,
    )  # wide, so that attention matters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LongformerModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_longformer(tmp_path_factory):
    """The folder of a tiny random Longformer with its tokenizer."""
    return save_longformer(tmp_path_factory.mktemp("models") / "tiny_longformer")
