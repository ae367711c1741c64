"""What reads a stranger's files: how an original is forged, and what reading it gives."""

import hashlib
import io
import json
import random
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from lightning_dsmoe.analysis.certificate.reading import read_certificate
from lightning_dsmoe.data.corpus import find_corpus
from lightning_dsmoe.data.token_cache import open_token_file
from lightning_dsmoe.data.token_file import INDEX, SPLITS, TokenFile, read_tokens
from lightning_dsmoe.inference import SparseModel, load_decoder
from lightning_dsmoe.inference.artifact.certificate import load_certificate
from lightning_dsmoe.routing import SelectionPlan
from lightning_dsmoe.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from lightning_dsmoe.training.language_model import DSMoELanguageModel

from .mutations import mutated_bytes, mutated_data

GOLDEN = Path(__file__).parents[1] / "golden" / "files_v0_1"
TEXT = "to be, or not to be: that is the question. é\n"


class Reader(ABC):
    """Files in a folder of its own, forged and read again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def forge(self, random: random.Random) -> object:
        """Write changed files; what reading must give if it gives anything, None if that varies."""

    @abstractmethod
    def read(self) -> object:
        """Read them, and use what they hold; give what changes with it."""


class Checkpoint(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "model.ckpt"
        self.whole = (GOLDEN / "checkpoint.ckpt").read_bytes()
        self.content = torch.load(io.BytesIO(self.whole), weights_only=True)
        self.path.write_bytes(self.whole)
        self.load = load_decoder
        self.expected = self.read()

    def forge(self, random: random.Random) -> object:
        # Lightning's own way is ten times slower.
        self.load = (
            load_decoder if random.random() < 0.9 else DSMoELanguageModel.load_from_checkpoint
        )
        match random.randrange(3):
            case 0:  # its records have checksums
                self.path.write_bytes(mutated_bytes(self.whole, random))
                return self.expected
            case 1:
                self.path.write_bytes(self._with_another_pickle(random))
            case 2:
                torch.save(mutated_data(self.content, random), self.path)
        return None

    def _with_another_pickle(self, random: random.Random) -> bytes:
        packed = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(self.whole)) as source,
            zipfile.ZipFile(packed, "w") as target,
        ):
            for record in source.infolist():
                content = source.read(record)
                if record.filename.endswith("data.pkl"):
                    content = mutated_bytes(content, random)
                target.writestr(record.filename, content)
        return packed.getvalue()

    def read(self) -> object:
        loaded = self.load(self.path)
        return _digest(loaded.decoder.state_dict())


class Artifact(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        SparseModel.load(GOLDEN / "sparse").save(folder / "present")
        self.originals = [GOLDEN / "sparse", GOLDEN / "sparse_int8", folder / "present"]
        self.copy = folder / "artifact"

    def forge(self, random: random.Random) -> object:
        original = random.choice(self.originals)
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(original, self.copy)
        name = random.choice([path.name for path in original.iterdir() if path.suffix != ".md"])
        path = self.copy / name
        if random.random() < 0.5 and (path.suffix == ".json"):
            path.write_bytes(_as_json(mutated_data(json.loads(path.read_bytes()), random)))
        elif path.suffix == ".safetensors" and random.random() < 0.5:
            path.write_bytes(_with_another_header(path.read_bytes(), random))
        else:
            path.write_bytes(mutated_bytes(path.read_bytes(), random))
        # Certificates have the hashes of the model that they belong to.
        if random.random() < 0.2 or name == "SHA256SUMS":
            return _read_artifact(original)
        if random.random() < 0.8:
            (self.copy / "certificate.json").unlink(missing_ok=True)
        _sign(self.copy)
        return None

    def read(self) -> object:
        return _read_artifact(self.copy)


class Plan(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "plan.json"
        plan = SelectionPlan.load(GOLDEN / "sparse" / "plan.json")
        self.originals = [
            json.loads((GOLDEN / "sparse" / "plan.json").read_bytes()),
            SelectionPlan(
                plan.experts, plan.attention, {"blocks.0.feed_forward": plan.attention}
            ).to_dict(),
        ]

    def forge(self, random: random.Random) -> object:
        _forge_json(self.path, random.choice(self.originals), random)
        return None

    def read(self) -> object:
        return SelectionPlan.load(self.path).to_dict()


class Certificate(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.original = json.loads((GOLDEN / "sparse" / "certificate.json").read_bytes())

    def forge(self, random: random.Random) -> object:
        _forge_json(self.folder / "certificate.json", self.original, random)
        return None

    def read(self) -> object:
        return read_certificate("certificate.json", load_certificate(self.folder))


class TokenCache(Reader):
    """Damaged tokens are made anew, so what is read is always what the text says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
        self.cache = folder / "cache"
        self.tokenizer: ByteTokenizer | None = None
        self.expected = {}
        for tokenizer in (None, ByteTokenizer()):
            self.tokenizer = tokenizer
            self.expected[tokenizer is None] = self.read()
        self.originals = _files(self.cache)

    def forge(self, random: random.Random) -> object:
        self.tokenizer = random.choice((None, ByteTokenizer()))
        is_json = _write_forged(self.originals, random)
        return None if is_json else self.expected[self.tokenizer is None]

    def read(self) -> object:
        return _content(
            open_token_file(
                find_corpus(str(self.folder / "text.txt")),
                self.tokenizer,
                val_fraction=0.2,
                test_fraction=0.1,
                cache_dir=self.cache,
            )
        )


class TokenFolder(Reader):
    """A folder of tokens without its text."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        cache = TokenCache(folder)
        cache.tokenizer = None
        self.expected = cache.read()
        self.tokens = next(
            path.parent
            for path in cache.cache.rglob(INDEX)
            if _content(read_tokens(path.parent)) == self.expected
        )
        self.originals = _files(self.tokens)

    def forge(self, random: random.Random) -> object:
        return None if _write_forged(self.originals, random) else self.expected

    def read(self) -> object:
        return _content(read_tokens(self.tokens))


def _files(folder: Path) -> dict[Path, bytes]:
    """Files of tokens in the order in which they are written: what describes others comes later."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    paths.sort(key=lambda path: (path.suffix == ".json", path.name == INDEX, path))
    return {path: path.read_bytes() for path in paths}


def _write_forged(originals: dict[Path, bytes], random: random.Random) -> bool:
    """Write one file changed and the others as they were; whether that one is JSON."""
    forged = random.choice(list(originals))
    for path, whole in originals.items():
        if path != forged:
            path.write_bytes(whole)
        elif path.suffix == ".json":
            _forge_json(path, json.loads(whole), random)
        else:
            path.write_bytes(mutated_bytes(whole, random))
    return forged.suffix == ".json"


def _content(tokens: TokenFile) -> tuple[dict[str, list[int]], dict[str, str]]:
    spans = {split: tokens.span(split) for split in SPLITS}
    found: dict[str, list[int]] = {s: span.read(0, len(span)).tolist() for s, span in spans.items()}
    return found, {split: tokens.tokenizer.decode(each) for split, each in found.items()}


class TokenizerFile(Reader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "tokenizer.json"
        self.originals = [CharTokenizer(TEXT).to_dict(), ByteTokenizer().to_dict(), *_of_packages()]
        self.originals += [{"kind": "huggingface", "json": json.dumps(self.originals[-1])}]

    def forge(self, random: random.Random) -> object:
        original = random.choice(self.originals)
        if original.get("kind") == "huggingface" and random.random() < 0.8:
            inner = mutated_data(json.loads(original["json"]), random)
            self.path.write_bytes(_as_json({**original, "json": _as_json(inner).decode()}))
        else:
            _forge_json(self.path, original, random)
        return None

    def read(self) -> object:
        tokenizer = load_tokenizer(self.path)
        tokens = tokenizer.encode("to be")
        return tokenizer.decode(tokens.tolist()), tokenizer.beginning


READERS: dict[str, type[Reader]] = {
    "checkpoint": Checkpoint,
    "artifact": Artifact,
    "plan": Plan,
    "certificate": Certificate,
    "token cache": TokenCache,
    "token folder": TokenFolder,
    "tokenizer": TokenizerFile,
}


def _of_packages() -> list[dict[str, Any]]:
    """Tokenizers of the `tokenizers` package, of its two most frequent models."""
    added = {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False}
    added |= {"normalized": False, "special": True}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    common = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added],
        "normalizer": {"type": "NFC"},
        "post_processor": template,
    }
    pieces = [["<s>", 0.0], ["▁", -1.0], ["t", -2.0], ["o", -2.5], ["▁to", -1.5], ["be", -3.0]]
    vocab = {"<s>": 0, "t": 1, "o": 2, "to": 3, "b": 4, "e": 5, "Ġ": 6, "be": 7}
    return [
        common
        | {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "always",
                "split": True,
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}],
            },
            "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
        },
        common
        | {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [["t", "o"], ["b", "e"]],
            },
        },
    ]


def _forge_json(path: Path, data: object, random: random.Random) -> None:
    if random.random() < 0.6:
        path.write_bytes(_as_json(mutated_data(data, random)))
    else:
        path.write_bytes(mutated_bytes(_as_json(data), random))


def _as_json(data: object) -> bytes:
    return json.dumps(data, indent=1).encode()


def _with_another_header(whole: bytes, random: random.Random) -> bytes:
    size = int.from_bytes(whole[:8], "little")
    header = _as_json(mutated_data(json.loads(whole[8 : 8 + size]), random))
    return len(header).to_bytes(8, "little") + header + whole[8 + size :]


def _sign(path: Path) -> None:
    """Make the sums fit the files, as someone who forges them would."""
    names = sorted(p.name for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    lines = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (path / "SHA256SUMS").write_text("".join(lines))


def _read_artifact(path: Path) -> object:
    model = SparseModel.load(path)
    return _digest(model.state_dict()), model.plan.to_dict(), model.architecture


def _digest(state: "OrderedDict[str, Any] | dict[str, Any]") -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
