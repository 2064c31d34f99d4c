"""The repository root on the path, so that tests import the two scripts as a notebook would; runs that tests share."""

import sys
from pathlib import Path

import pytest

for folder in (Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent):
    sys.path.insert(0, str(folder))


from make_sample import make_sample  # noqa: E402
from small_table import arguments, best_model, small_table  # noqa: E402

import explain_clinicalLF as explain  # noqa: E402
import train  # noqa: E402
from clinical_lf import files, plots  # noqa: E402


@pytest.fixture(autouse=True)
def unpainted(monkeypatch):
    """Figures are made and not painted, which is half of a small run's time; those of the shared runs are painted."""
    monkeypatch.setattr(plots, "save_figure", lambda path, _: files.write_whole(path, lambda name: name.touch()))


@pytest.fixture
def log(caplog, monkeypatch):
    """The program's log, also where an earlier test sent it to the standard output."""
    monkeypatch.setattr(files.logger, "propagate", True)
    caplog.set_level("INFO", files.logger.name)
    return caplog


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of one epoch on 40 stays; tests may evaluate it, and change nothing else."""
    folder = tmp_path_factory.mktemp("finished")
    small_table().to_csv(folder / "data.csv", index=False)
    assert train.main(arguments(folder, folder / "data.csv")) == 0
    return folder


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory):
    """The same of three epochs of a model with two layers on 90 synthetic stays, with saved attention."""
    folder = tmp_path_factory.mktemp("sample")
    make_sample(90, seed=1).table.to_csv(folder / "data.csv", index=False)
    options = ["--n-layers", 2, "--max-epochs", 3, "--patience", 99, "--save-attention-every", 50]
    assert train.main(arguments(folder, folder / "data.csv", *options)) == 0
    return folder


@pytest.fixture(scope="session")
def explained(sample_run):
    """The run's model explained on its own data, results beside it: neither is named."""
    few = {"stays": 2, "max_stays": 5, "n_bootstrap": 50}
    old = best_model(sample_run).parent.parent / "explainability" / "stay_0.png"  # of an earlier explanation
    old.parent.mkdir()
    old.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain.Effort.__new__, "__defaults__", (2, 100, 40, 10**9, True))  # of `Effort`
        return explain.run_explainability_analysis(best_model(sample_run), cache_dir=str(sample_run / "cache"), **few)


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
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 1040, "type_vocab_size": 1}
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
    wide = {"initializer_range": 0.2, "attention_window": list(attention_window)}  # so that attention matters
    config = LongformerConfig(**sizes, **tokens, **wide)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LongformerModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_longformer(tmp_path_factory):
    """The folder of a tiny random Longformer with its tokenizer."""
    return save_longformer(tmp_path_factory.mktemp("models") / "tiny_longformer")
