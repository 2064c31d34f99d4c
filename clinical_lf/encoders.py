"""What turns texts into vectors: an exact fast Longformer, any other Hugging Face encoder, and one without weights.

An encoder has id, dim, pooling, max_tokens, budget (tokens in a batch), n_devices, and `load`, `tokenise` (texts ->
anything with a length), `forward` (device number, tokenised texts -> (n, dim) float32). Its cache is train.py's.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn

from clinical_lf.files import WORDS, InputError, lock_folder, write_json
from clinical_lf.items import NUMBER, mask_numbers

CLINICAL_LONGFORMER = "yikuan8/Clinical-Longformer"
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
KIN_OF_ROBERTA = "roberta xlm-roberta camembert longformer roberta-prelayernorm xlm-roberta-xl mpnet".split()
PROBES = [f"Lab: {said}" for said in ("Lactate | Value: 4.1 mmol/L", "Glucose | Value: 1", "Culture", "50912")]


class EncoderUnreachable(InputError):
    """The text encoder's weights are neither on this machine nor can they be downloaded."""


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
        """Yield words for the two bins nearest to each number behind the item, and their weights, 16 together."""
        for what, part in zip(self.parts_of_item(mask_numbers(text))[1:], text.split(" | ")[1:]):
            for (place, number), per_octave in product(enumerate(NUMBER.findall(part)), (1, 4, 16)):
                # The logarithm to base 2, straight between powers of 2, is exact on any machine; below 1/64 all are 0.
                mantissa, exponent = math.frexp(min(float(number.replace(",", "")), 1e300) + 1 / 64)
                lower, weight = divmod(round(16 * (exponent + 2 * mantissa) * per_octave), 16)
                yield f"{what} {place} {per_octave} {lower}", 16 - weight
                yield f"{what} {place} {per_octave} {lower + 1}", weight

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
        # numpy promises that no version changes what RandomState gives
        self._bits = np.random.RandomState(768).randint(0, 2, (4, self.n_features, self.dim), np.int8)
        check_vectors(self)

    def unload(self) -> None:
        """Free nothing: there are no weights."""

    def tokenise(self, texts: Sequence[str]) -> list[str]:
        """Return the texts in lower case: a character counts as a token."""
        return [text.lower() for text in texts]

    def forward(self, device_number: int, texts: list[str]) -> np.ndarray:
        """Return the vectors of tokenised texts: (n, 768) float32."""
        vectors, plain = np.zeros((len(texts), self.dim), np.float32), [mask_numbers(text) for text in texts]
        inputs = (plain, plain, plain, map(self.numbers_of_item, texts))
        for vectorizer, said, bits, weight in zip(self._vectorizers, inputs, self._bits, self.weights):
            counts = vectorizer.transform(said)  # (n, n_features) sparse
            used = np.unique(counts.indices)
            signs = bits[used].astype(np.float32) * 2 - 1  # (n_used, dim)
            squares = np.asarray(counts.multiply(counts).sum(axis=1)).reshape(-1, 1)
            vectors += weight * ((counts[:, used] @ signs) / np.sqrt(np.maximum(squares, 1)))
        return vectors


class HuggingFaceEncoder:
    """A frozen Hugging Face encoder; a text's vector is its last layer, pooled as `folder_pooling` says.

    name: a hub id, `id@revision`, downloaded once to `home`, or a folder, whose content is its identity. devices: if
    none are given, all CUDA devices, else the CPU. dtype: "auto", "float32", "bfloat16". Raises InputError when the
    weights are unusable, EncoderUnreachable when they are nowhere to be had. Runs no foreign code.
    """

    def __init__(self, name: str, max_tokens: int, cache_dir: Path, home: Path, devices: Sequence, dtype: str) -> None:
        self.id, self.max_tokens, self._folder, file_name = name, max_tokens, Path(name), re.sub(r"[^\w.-]", "--", name)
        if self._folder.is_dir() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", name):
            if not (self._folder / "config.json").is_file():
                raise InputError(WORDS["encoder"]["no_config"].format(folder=self._folder))
            file_name = folder_fingerprint(self._folder)  # the same files under another name are the same encoder
            self.id = f"{self._folder.resolve().name}@{file_name}"
        else:
            self._folder = home / ("clinical_longformer" if name == CLINICAL_LONGFORMER else file_name)
        paths = cache_dir.glob(f"{file_name}-*-{max_tokens}/encoder.json")
        described = next((found for found in map(read_description, paths) if found.get("encoder") == name), {})
        if not described or (self._folder / "config.json").is_file():  # else a full cache needs no weights
            download_encoder(name, self._folder)
            with as_input_error(self._folder):
                config = transformers.AutoConfig.from_pretrained(self._folder, trust_remote_code=False)
                described = {"dim": config.hidden_size, "pooling": folder_pooling(self._folder, config)}
        self.dim, self.pooling = described["dim"], described["pooling"]
        self.cache_name = f"{file_name}-{self.pooling}-{max_tokens}"
        devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        self._devices = [torch.device(device) for device in devices]
        self._models: list[Any] = []  # one for each device, once loaded
        self.n_devices, on_cuda = len(self._devices), self._devices[0].type == "cuda"
        self.budget = 32_768 if on_cuda else 2_048
        if dtype == "auto":  # bfloat16 on GPUs from Ampere, on CPUs with AMX or AVX-512-BF16
            by_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            by_device = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else by_cpu
            dtype = "bfloat16" if by_device else "float32"
        self._dtype = getattr(torch, dtype)

    def load(self, cache_folder: Path) -> None:
        """Load the weights onto every device; refuse others than those that the folder's vectors were made with."""
        if self._models:
            return
        download_encoder(self.id, self._folder)
        options: dict[str, Any] = {"trust_remote_code": False, "weights_only": True, "dtype": torch.float32}
        with as_input_error(self._folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            model, info = transformers.AutoModel.from_pretrained(self._folder, **options, output_loading_info=True)
            config, path = model.config, self._folder / "sentence_bert_config.json"
            positions = getattr(config, "max_position_embeddings", None) or -1  # none, or XLNet's -1: they end nowhere
            if config.model_type in KIN_OF_ROBERTA:  # they count from behind the padding token
                positions -= config.pad_token_id + 1
            wishes = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            limits = (self.max_tokens, positions, wishes.get("max_seq_length") or -1)
            self._length_limit = min(limit for limit in limits if limit > 0)
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # transformers makes up an empty one
            raise InputError(f"{self._folder} has no tokenizer: copy tokenizer.json (or vocab files) from its source")
        lost = [key for key in info["missing_keys"] if "pooler" not in key]
        if lost or config.is_encoder_decoder:
            raise InputError(f"{self._folder} holds no complete encoder: {len(lost)} of its weights are missing")
        self._tokenizer, self._pad = tokenizer, tokenizer.pad_token_id or 0
        # A thousandth of the weights and the vocabulary. The pooler is never used, and random where the files lack it.
        weights = [(name, value.flatten()[::997].float()) for name, value in sorted(model.state_dict().items())]
        read = [name.encode() + value.numpy().tobytes() for name, value in weights if not name.startswith("pooler.")]
        read.append(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        digits, cached = hashlib.sha256(b"".join(read)).hexdigest()[:12], cache_folder / "encoder.json"
        if read_description(cached).get("weights", digits) != digits:
            raise InputError(WORDS["encoder"]["other_weights"].format(cache=cache_folder, folder=self._folder))
        facts = {name: getattr(self, name) for name in ("pooling", "max_tokens", "dim")}
        write_json(cached, facts | {"encoder": self.id, "weights": digits})
        windows = set(config.attention_window) if config.model_type == "longformer" else set()
        # Of attention: what is no Longformer has none, nor one whose layers differ; a longer band takes much memory.
        self.window = windows.pop() if len(windows) == 1 and self._length_limit <= 1024 else None
        model = (longformer_as_roberta(model) if self.window else model).to(self._dtype).eval().requires_grad_(False)
        self._models = [copy.deepcopy(model).to(device) for device in self._devices]
        check_vectors(self)

    def unload(self) -> None:
        """Free the weights; `load` loads them again."""
        self._models = []

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of each text's tokens."""
        options = {"truncation": True, "max_length": self._length_limit, "return_attention_mask": False}
        return [text_tokens or [self._pad] for text_tokens in self._tokenizer(list(texts), **options)["input_ids"]]

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
    auto = transformers.models.auto.modeling_auto  # loaded here: it takes a tenth of a start
    not_causal = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"}
    only_causal = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - not_causal  # a token reads none behind it
    is_causal = getattr(config, "is_decoder", False) or config.model_type in only_causal
    path, modules = folder / "1_Pooling" / "config.json", folder / "modules.json"
    if not path.is_file():
        return "last" if is_causal else "cls"
    wishes = json.loads(path.read_text("utf-8"))
    modes = [*np.atleast_1d(wishes.get("pooling_mode") or [])]  # since version 5.4
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
    distinct: dict[str, Any] = {str(tokens): tokens for tokens in encoder.tokenise(PROBES)}
    vectors = encoder.forward(0, [*distinct.values()])
    if len(vectors) > 1 and torch.pdist(torch.from_numpy(vectors)).min() <= 1e-4 * np.abs(vectors).max():
        encoder.unload()
        raise InputError(WORDS["encoder"]["one_vector"].format(encoder=encoder.id))


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


def read_description(path: Path) -> dict[str, Any]:
    """Return what a cache folder's encoder.json says; nothing where it is missing or damaged."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text("utf-8")))
    return {}


def folder_fingerprint(folder: Path) -> str:
    """Return 12 hex digits that change with a model folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".txt", ".model", ".safetensors", ".bin") and path.is_file():
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


@contextmanager
def as_input_error(folder: Path) -> Iterator[None]:
    """Make transformers quiet, and turn whatever it raises about a folder into an InputError."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{folder} cannot be used as a text encoder ({type(error).__name__}: {reason})") from error


def download_encoder(name: str, folder: Path) -> None:
    """Download a model's files unless they are here, no code; of several processes the first one does."""
    hub_id, _, revision = name.partition("@")
    is_here = (folder / "config.json").is_file
    with nullcontext() if is_here() else lock_folder(folder.parent):
        if is_here():  # or another process was faster
            return
        try:  # one request without retries: on a machine without network this fails within seconds
            info = HfApi(token=False).model_info(hub_id, revision=revision or None, timeout=10)
            is_safe = any(re.match(r"model.*\.safetensors", file.rfilename) for file in info.siblings or [])
            wanted = ["*.json", "*.txt", "*.model", "model*.safetensors" if is_safe else "pytorch_model*.bin"]
            begun = folder.with_name(f".{folder.name}.partial")  # a later call goes on with it
            snapshot_download(hub_id, revision=revision or None, local_dir=begun, token=False, allow_patterns=wanted)
            begun.rename(folder)
        except Exception as error:
            facts = {"name": name, "folder": folder, "error": type(error).__name__, "hub_id": hub_id}
            raise EncoderUnreachable(WORDS["encoder"]["unreachable"].format(**facts)) from error
