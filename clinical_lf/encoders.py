"""What turns texts into vectors: an exact fast Longformer, any other Hugging Face encoder, and one without weights.

An encoder has id, dim, pooling, max_tokens, budget (tokens in a batch), n_devices, and `load`, `tokenise` (texts ->
anything with a length), `forward` (device number, tokenised texts -> (n, dim) float32). Its cache is train.py's.
"""

import contextlib
import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from scipy.spatial.distance import pdist
from torch import Tensor, nn
from transformers import logging
from transformers.models.auto import modeling_auto

from clinical_lf.files import WORDS, InputError, lock_folder, read_json, write_json
from clinical_lf.items import NUMBER, mask_numbers

CLINICAL_LONGFORMER = "yikuan8/Clinical-Longformer"
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
NOT_CAUSAL = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"}
ONLY_CAUSAL = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - NOT_CAUSAL  # a token reads none behind it
KIN_OF_ROBERTA = "roberta xlm-roberta camembert longformer roberta-prelayernorm xlm-roberta-xl mpnet".split()
PROBES = [f"Lab: {said}" for said in ("Lactate | Value: 4.1 mmol/L", "Glucose | Value: 1", "Culture", "50912")]


class EncoderUnreachable(InputError):
    """The text encoder's weights are neither on this machine nor can they be downloaded."""


def without_surrogates(text: str) -> str:
    """Return the text with question marks for lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def as_file_name(encoder: str) -> str:
    """Return an encoder's id as the name of a folder."""
    return re.sub(r"[^\w.-]", "--", encoder)


def soft_bins(number: float, per_octave: int) -> list[tuple[int, int]]:
    """Return the two bins nearest to a number's magnitude and their whole weights, 16 together: near numbers share."""
    # The logarithm to base 2, straight between powers of 2, is exact on any machine; below 1/64 all are near 0.
    mantissa, exponent = math.frexp(min(number, 1e300) + 1 / 64)
    place = (exponent + 2 * mantissa) * per_octave
    lower = math.floor(place)
    weight = round(16 * (place - lower))
    return [(lower, 16 - weight), (lower + 1, weight)]


@cache
def hashing_bits(*shape: int) -> np.ndarray:
    """Return random 0 and 1, int8: numpy promises that no version changes what RandomState gives."""
    return np.random.RandomState(768).randint(0, 2, shape, np.int8)


class HashingEncoder:
    """An encoder without weights: what a text says of its item, its numbers, words and character n-grams, hashed.

    Each part of a text counts together with its item: "far above range" means one thing of lactate, another of glucose.
    A vector changes smoothly with the numbers; it is made of whole numbers, exact in float32: the same on any machine.
    """

    id, dim, pooling, cache_name, n_features = "hashing", 768, "none", "hashing-v6-768", 2**14
    max_tokens, budget, n_devices = 512, 200_000, 1
    weights = np.sqrt(np.array([0.5, 0.15, 0.05, 0.3], np.float32))  # of items, words, characters, numbers

    def parts_of_item(self, text: str) -> list[str]:
        """Return the item, and each part of the text together with it."""
        item, *parts = text.split(" | ")
        return [item, *(f"{item} {part}" for part in parts)]

    def numbers_of_item(self, text: str) -> Iterator[tuple[str, int]]:
        """Yield words for the soft bins of each number behind the item, with their weights."""
        item, *parts = text.split(" | ")
        for part in parts:
            what = f"{item} {NUMBER.sub('#', part)}"
            for (place, number), per_octave in product(enumerate(NUMBER.findall(part)), (1, 4, 16)):
                for bin_number, weight in soft_bins(float(number.replace(",", "")), per_octave):
                    yield f"{what} {place} {per_octave} {bin_number}", weight

    def load(self, cache_folder: Path) -> None:
        """Make ready to encode."""
        from sklearn.feature_extraction import FeatureHasher
        from sklearn.feature_extraction.text import HashingVectorizer

        counts = {"n_features": self.n_features, "norm": None, "dtype": np.float32}  # signed whole counts
        self._vectorizers = (
            HashingVectorizer(analyzer=self.parts_of_item, **counts),
            HashingVectorizer(token_pattern=r"[^\s|:(),]+", ngram_range=(1, 2), **counts),
            HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), **counts),
            FeatureHasher(self.n_features, input_type="pair", dtype=np.float32),
        )
        check_vectors(self)

    def unload(self) -> None:
        """Free nothing: there are no weights."""

    def tokenise(self, texts: Sequence[str]) -> list[str]:
        """Return the texts in lower case: a character counts as a token."""
        return [without_surrogates(text).lower() for text in texts]

    def forward(self, device_number: int, texts: list[str]) -> np.ndarray:
        """Return the vectors of tokenised texts: (n, 768) float32."""
        vectors = np.zeros((len(texts), self.dim), np.float32)
        plain = [mask_numbers(text) for text in texts]
        inputs = (plain, plain, plain, [self.numbers_of_item(text) for text in texts])
        bits = hashing_bits(len(inputs), self.n_features, self.dim)
        for part, vectorizer in enumerate(self._vectorizers):
            counts = vectorizer.transform(inputs[part])  # (n, n_features) sparse
            used = np.unique(counts.indices)
            signs = bits[part, used].astype(np.float32) * 2 - 1  # (n_used, dim)
            squares = np.asarray(counts.multiply(counts).sum(axis=1)).reshape(-1, 1)
            vectors += self.weights[part] * ((counts[:, used] @ signs) / np.sqrt(np.maximum(squares, 1)))
        return vectors


class HuggingFaceEncoder:
    """A frozen Hugging Face encoder; a text's vector is its last layer, pooled as `folder_pooling` says.

    name: a hub id, `id@revision`, downloaded once to `weights_dir`, or a folder, whose content is its identity.
    devices: None for all CUDA devices, else the CPU. dtype: "auto", "float32", "bfloat16". Raises InputError when the
    weights are unusable, EncoderUnreachable when they are nowhere to be had. Runs no foreign code.
    """

    def __init__(
        self, name: str, max_tokens: int, cache_dir: Path, weights_dir: Path, devices: Sequence | None, dtype: str
    ) -> None:
        self.id, self.max_tokens, self._folder = name, max_tokens, Path(name)
        self._is_local = Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", name)
        if self._is_local:
            self.id = f"{self._folder.resolve().name}@{folder_fingerprint(self._folder)}"
        else:
            self._folder = weights_dir / ("clinical_longformer" if name == CLINICAL_LONGFORMER else as_file_name(name))
        is_here = self._is_local or (self._folder / "config.json").is_file()  # else a full cache needs no weights
        paths = [] if is_here else sorted(cache_dir.glob(f"{as_file_name(name)}-*-{max_tokens}/encoder.json"))
        described = next((found for found in map(read_description, paths) if found.get("encoder") == name), {})
        if not described:
            config = self._config()
            with as_input_error(self._folder):
                described = {"dim": config.hidden_size, "pooling": folder_pooling(self._folder, config)}
        self.dim, self.pooling = described["dim"], described["pooling"]
        self.cache_name = f"{as_file_name(self.id)}-{self.pooling}-{max_tokens}"
        if self._is_local:  # the same files may have made vectors under another name
            same = cache_dir.glob(f"*--{self.id.rpartition('@')[2]}-{self.pooling}-{max_tokens}")
            self.cache_name = min((folder.name for folder in same), default=self.cache_name)
        devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        self._devices = [torch.device(device) for device in devices]
        self._models: list[Any] = []  # one for each device, once loaded
        self.n_devices, self._dtype = len(self._devices), encoder_dtype(dtype, self._devices[0])
        self.budget = 32_768 if self._devices[0].type == "cuda" else 2_048

    def _config(self) -> Any:
        """Return the model's configuration, downloaded first where it is not here."""
        if not (self._folder / "config.json").is_file():
            if self._is_local:
                raise InputError(WORDS["encoder"]["no_config"].format(folder=self._folder))
            download_encoder(self.id, self._folder)
        with as_input_error(self._folder):
            return transformers.AutoConfig.from_pretrained(self._folder, trust_remote_code=False)

    def load(self, cache_folder: Path) -> None:
        """Load the weights onto every device; refuse others than those that the folder's vectors were made with."""
        if self._models:
            return
        config = self._config()
        with as_input_error(self._folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            options = {"trust_remote_code": False, "weights_only": True, "dtype": torch.float32}
            model, info = transformers.AutoModel.from_pretrained(self._folder, **options, output_loading_info=True)
            self._length_limit = min(self.max_tokens, token_limit(config, self._folder))
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # transformers makes up an empty one
            raise InputError(f"{self._folder} has no tokenizer: copy tokenizer.json (or vocab files) from its source")
        lost = [key for key in info["missing_keys"] if "pooler" not in key]
        if lost or config.is_encoder_decoder:
            raise InputError(f"{self._folder} holds no complete encoder: {len(lost)} of its weights are missing")
        self._tokenizer, self._pad = tokenizer, tokenizer.pad_token_id or 0
        self._check_weights(model, cache_folder)
        windows = set(config.attention_window) if config.model_type == "longformer" else set()
        self.window: int | None = None  # of attention; what is no Longformer has none, nor one whose layers differ
        if len(windows) == 1 and self._length_limit <= 1024:  # a longer band takes much memory
            self.window = windows.pop()
            model = longformer_as_roberta(model)
        model = model.to(self._dtype).eval().requires_grad_(False)
        if self._devices[0].type == "cpu" and self._dtype == torch.float32 and torch.backends.mkldnn.is_available():
            for linear in [layer for layer in model.modules() if type(layer) is nn.Linear]:
                linear.__class__ = OneDnnLinear
        others = [copy.deepcopy(model).to(device) for device in self._devices[:-1]]  # the last takes the model itself
        self._models = [*others, model.to(self._devices[-1])]
        check_vectors(self)

    def unload(self) -> None:
        """Free the weights; `load` loads them again."""
        self._models = []

    def _check_weights(self, model: nn.Module, cache_folder: Path) -> None:
        """Refuse weights other than those the cache was made with; describe them there, where nothing does."""
        path, weights = cache_folder / "encoder.json", model_fingerprint(model, self._tokenizer)
        described = read_description(path)
        if described.get("weights", weights) != weights:
            raise InputError(WORDS["encoder"]["other_weights"].format(cache=cache_folder, folder=self._folder))
        facts = {"encoder": self.id, "pooling": self.pooling, "max_tokens": self.max_tokens, "dim": self.dim}
        facts["weights"] = weights
        if not described.items() >= facts.items():
            write_json(path, facts)

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of each text's tokens."""
        clean = [without_surrogates(text) for text in texts]
        options = {"truncation": True, "max_length": self._length_limit, "return_attention_mask": False}
        return [text_tokens or [self._pad] for text_tokens in self._tokenizer(clean, **options)["input_ids"]]

    @torch.inference_mode()
    def forward(self, device_number: int, tokens: list[list[int]]) -> np.ndarray:
        """Return the vectors of tokenised texts: (n, dim) float32."""
        model, device = self._models[device_number], self._devices[device_number]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in tokens], True, self._pad)  # (n, L)
        n_tokens = torch.tensor([len(text) for text in tokens], device=device)
        is_token = torch.arange(ids.shape[1], device=device) < n_tokens[:, None]  # (n, L)
        highest, n_known = int(ids.max()), model.get_input_embeddings().num_embeddings
        if highest >= n_known:
            raise InputError(WORDS["encoder"]["two_models"].format(folder=self._folder, highest=highest, known=n_known))
        mask = is_token.long() if self.window is None else band_mask(is_token, self.window)
        hidden = model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state.float()  # (n, L, dim)
        mode, _, unit = self.pooling.partition("-")
        if mode == "mean":
            vectors = (hidden * is_token[:, :, None]).sum(1) / n_tokens[:, None]
        else:
            vectors = hidden[torch.arange(len(hidden), device=device), n_tokens - 1 if mode == "last" else 0]
        return (nn.functional.normalize(vectors, dim=1) if unit else vectors).cpu().numpy()


def folder_pooling(folder: Path, config: Any) -> str:
    """Return what a sentence-transformers folder asks for, "cls", "mean" or "last" (and "-unit"), else the usual."""
    is_causal = getattr(config, "is_decoder", False) or config.model_type in ONLY_CAUSAL
    path, modules = folder / "1_Pooling" / "config.json", folder / "modules.json"
    if not path.is_file():
        return "last" if is_causal else "cls"
    wishes = read_json(path)
    named = wishes.get("pooling_mode") or []  # since version 5.4
    modes = [named] if isinstance(named, str) else [*named]
    modes += [name for name, is_on in wishes.items() if name.startswith("pooling_mode_") and is_on]
    found = {POOLINGS.get(re.sub("pooling_mode_|_tokens?$", "", mode), "") for mode in modes}
    if len(found) != 1 or "" in found:
        raise InputError(f"{path} asks for {' and '.join(modes) or 'nothing'}; known are {', '.join(POOLINGS)}, one.")
    if is_causal and "cls" in found:
        raise InputError(WORDS["encoder"]["reads_nothing"].format(path=path))
    listed = modules.read_text("utf-8") if modules.is_file() else ""
    if ".Dense" in listed:
        raise InputError(f"{modules} has a Dense layer behind the pooling, which is not run here: give another encoder")
    return found.pop() + ("-unit" if ".Normalize" in listed else "")


def check_vectors(encoder: HashingEncoder | HuggingFaceEncoder) -> None:
    """Unload and refuse an encoder that gives texts of different tokens one vector, as a causal model's first does."""
    tokens = encoder.tokenise(PROBES)
    distinct: list = [text for number, text in enumerate(tokens) if text not in tokens[:number]]
    vectors = encoder.forward(0, distinct)
    if pdist(vectors).min(initial=np.inf) <= 1e-4 * np.abs(vectors).max():
        encoder.unload()
        raise InputError(WORDS["encoder"]["one_vector"].format(encoder=encoder.id))


class OneDnnLinear(nn.Linear):
    """A Linear through oneDNN, as bfloat16 has it anyway: on AMD processors twice as fast as MKL, torch's choice."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


def band_mask(is_token: Tensor, window: int) -> Tensor | None:
    """Return where Longformer's local attention may look, (n, L) tokens -> (n, 1, 1 or L, L) for SDPA; None: all."""
    length = is_token.shape[1]
    if length <= window // 2 + 1:
        return None if is_token.all() else is_token[:, None, None, :]
    place = torch.arange(length, device=is_token.device)
    distance = (place[:, None] - place).abs()  # (L, L)
    in_window = (distance <= window // 2) & is_token[:, None, :]  # (n, L, L)
    return (in_window | (distance == 0))[:, None]  # padding looks at itself, so that no softmax runs over nothing


def longformer_as_roberta(longformer: Any) -> Any:
    """Return the same weights in RoBERTa's layers: without global attention (`*_global`) only the band differs."""
    config = transformers.RobertaConfig.from_dict(longformer.config.to_dict() | {"model_type": "roberta"})
    roberta = transformers.RobertaModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
    not_there = re.compile(r"_global\.|^pooler\.|position_ids$")
    kept = {name: weight for name, weight in longformer.state_dict().items() if not not_there.search(name)}
    roberta.load_state_dict(kept, strict=True)
    return roberta


def token_limit(config: Any, folder: Path) -> int:
    """Return after how many tokens a text is cut: where the model's positions end, or where its folder wants it."""
    positions = getattr(config, "max_position_embeddings", None) or -1  # none, or XLNet's -1: they end nowhere
    if config.model_type in KIN_OF_ROBERTA:  # they count from behind the padding token
        positions -= config.pad_token_id + 1
    path = folder / "sentence_bert_config.json"
    wishes = read_json(path) if path.is_file() else {}
    return min((limit for limit in (positions, wishes.get("max_seq_length") or -1) if limit > 0), default=1_000_000)


def encoder_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; "auto" is bfloat16 on GPUs from Ampere, CPUs with AMX or AVX-512-BF16, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def read_description(path: Path) -> dict[str, Any]:
    """Return what a cache folder's encoder.json says; nothing where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(read_json(path))
    return {}


def folder_fingerprint(folder: Path) -> str:
    """Return 12 hex digits that change with a model folder's files: names, sizes, first and last MB of each."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin") and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(0, path.stat().st_size - 2**20))
                digest.update(file.read(2**20))
    return digest.hexdigest()[:12]


def model_fingerprint(model: nn.Module, tokenizer: Any) -> str:
    """Return 12 hex digits of the loaded weights (a thousandth of them) and the vocabulary, whatever their files."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("pooler."):  # never used, and random where the files have none
            digest.update(name.encode() + value.flatten()[::997].float().numpy().tobytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def as_input_error(folder: Path) -> Iterator[None]:
    """Keep transformers quiet, and turn whatever it raises about a folder into an InputError."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{folder} cannot be used as a text encoder ({type(error).__name__}: {reason})") from error
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def download_encoder(name: str, folder: Path) -> None:
    """Download a model's files, no code, or go on where it was stopped; of several processes the first one does."""
    hub_id, _, revision = name.partition("@")
    with lock_folder(folder.parent):
        if (folder / "config.json").is_file():  # another process was faster
            return
        try:  # one request without retries: on a machine without network this fails within seconds
            info = HfApi(token=False).model_info(hub_id, revision=revision or None, timeout=10)
            is_safe = any(re.match(r"model.*\.safetensors", file.rfilename) for file in info.siblings or [])
            wanted = ["*.json", "*.txt", "*.model", "model*.safetensors" if is_safe else "pytorch_model*.bin"]
            begun = folder.with_name(f".{folder.name}.partial")
            snapshot_download(hub_id, revision=revision or None, local_dir=begun, token=False, allow_patterns=wanted)
            begun.rename(folder)
        except Exception as error:
            facts = {"name": name, "folder": folder, "error": type(error).__name__, "hub_id": hub_id}
            raise EncoderUnreachable(WORDS["encoder"]["unreachable"].format(**facts)) from error
