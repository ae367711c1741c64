"""The data module of text files."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_dsmoe.data.loader import Batch, ResumableLoader, unfinished_batches
from lightning_dsmoe.data.position import MovedPosition, Position, Share, move, tell_change
from lightning_dsmoe.data.resuming import check_same_data, saved_position
from lightning_dsmoe.data.splits import check_fractions, check_length, open_splits
from lightning_dsmoe.data.token_file import Split, SplitSize, TokenFile
from lightning_dsmoe.data.windows import (
    EvaluationSampler,
    EvaluationWindows,
    TrainingSampler,
    TrainingWindows,
)
from lightning_dsmoe.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


class TextDataModule(LightningDataModule):
    """Text files as batches of next-token windows, resumable in the middle of an epoch.

    Batches are dicts of `input_ids` and `labels`, both int64 `[B, T]`; label -100 is ignored.
    Training windows start at a new random token every epoch; evaluation predicts every token but
    a split's first exactly once. The text is split by position: train first, then val, then test.

    Args:
        files: A path, a glob, or a list of them; by default the Python sources of the running
            interpreter's standard library. Or a folder of tokens, the `token_folder` of text that
            was tokenized before with the same tokenizer and fractions.
        tokenizer: "byte", "char", the path of a Hugging Face tokenizer JSON (or of one that
            `Tokenizer.to_dict` wrote), or a tokenizer.
        context: Context length T: tokens in a window.
        batch_size: Sequences in a batch, B, on each rank.
        val_fraction: Share of the text in the validation split.
        test_fraction: Share of the text in the test split; with 0, the test and predict loaders
            read the validation split.
        seed: Random seed of the order of the training windows.
        num_workers: Processes that load batches, and before that tokenize; with 0, the training
            process does both.
        cache_dir: Folder of the tokenized text; by default in the user's cache.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> import pathlib, tempfile
        >>> from lightning_dsmoe import TextDataModule
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "text.txt").write_text("to be or not to be, " * 20)
        >>> options = {"context": 8, "batch_size": 2, "cache_dir": str(folder)}
        >>> data = TextDataModule(str(folder / "*.txt"), tokenizer="char", **options)
        >>> data.setup("fit")
        >>> data.vocab_size
        8
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["input_ids"].shape, batch["labels"].shape
        (torch.Size([2, 8]), torch.Size([2, 8]))
        >>> data.tokenizer.decode(next(iter(data.val_dataloader()))["input_ids"][0].tolist())
        'to be or'
    """

    def __init__(
        self,
        # A path comes after a list: jsonargparse would take the text of a list for a path.
        files: str | list[str] | Path | list[Path] | None = None,
        *,
        tokenizer: str | Tokenizer = "byte",
        context: int = 128,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int = 1234,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.files, self.cache_dir = files, cache_dir
        self.context, self.batch_size = context, batch_size
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seed, self.num_workers = seed, num_workers
        for name, least in {"context": 1, "batch_size": 1, "seed": 0, "num_workers": 0}.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_fractions(val_fraction, test_fraction)
        self._given_tokenizer = _given_tokenizer(tokenizer)
        self._token_file: TokenFile | None = None
        self._train_loader: ResumableLoader | None = None
        self._position: Position | None = None
        self._saved_share: Share | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; asking for a character tokenizer reads the corpus."""
        return self._given_tokenizer or self._tokens().tokenizer

    @property
    def vocab_size(self) -> int:
        """Vocabulary size that a model needs, known before `setup`."""
        return self.tokenizer.vocab_size

    def bytes_per_token(self, split: Split) -> float:
        """Return the mean number of UTF-8 bytes per token of a split.

        Args:
            split: "train", "val" or "test".
        """
        size = self._size(split)
        return size.bytes / size.tokens

    def chars_per_token(self, split: Split) -> float:
        """Return the mean number of characters per token of a split.

        Args:
            split: "train", "val" or "test".
        """
        size = self._size(split)
        return size.characters / size.tokens

    @property
    def token_folder(self) -> Path:
        """Folder of the tokens, which are made first if need be; `files` may name it elsewhere."""
        return self._tokens().folder

    def prepare_data(self) -> None:
        self._tokens()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens and check them.

        Args:
            stage: "fit", "validate", "test" or "predict"; None for all.

        Raises:
            ValueError: If the corpus is missing, empty or not text, a split that the stage needs
                is too short for one window, or the model's vocabulary is too small.
        """
        tokens = self._tokens()
        needed: dict[str | None, tuple[Split, ...]] = {
            None: ("train", "val", self._test_split),
            "fit": ("train", "val"),
            "validate": ("val",),
        }
        for split in needed.get(stage, (self._test_split,)):
            check_length(tokens, split, self.context)
        module = self.trainer.lightning_module if self.trainer is not None else None
        vocab_size = getattr(module, "vocab_size", None)
        if isinstance(vocab_size, int) and vocab_size < self.vocab_size:
            raise ValueError(
                f"the model's vocab_size is {vocab_size}, but the tokenizer has "
                f"{self.vocab_size} tokens"
            )

    def train_dataloader(self) -> ResumableLoader:
        windows = TrainingWindows(self._tokens().span("train"), self.context)
        sampler = TrainingSampler(windows, seed=self.seed, **self._ranks())
        loader = ResumableLoader(
            windows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # A loader draws a seed: without its own generator, one of training's random numbers.
            generator=torch.Generator(),
            # Batches of one shape, unless there is not even one full batch.
            drop_last=len(sampler) >= self.batch_size,
        )
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        position = self._position or Position(epoch, 0, 0)
        share = self._share()
        saved = self._saved_share or share
        # Lightning's search for a batch size restores a checkpoint of before the first batch.
        if saved != share and position != (0, 0, 0):
            if self.trainer is not None:
                follow = MovedPosition(loader, position, len(windows), share)
                self.trainer.callbacks.append(follow)  # type: ignore[attr-defined]
            if position.windows:
                position = move(position, len(windows), share, len(loader), accumulate=1)
            tell_change(position, saved, share)
        loader.resume(*position)
        self._position = self._saved_share = None
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader(self._test_split)

    predict_dataloader = test_dataloader

    def state_dict(self) -> dict[str, Any]:
        position, share = self._position or Position(0, 0, 0), self._saved_share or self._share()
        if (loader := self._train_loader) is not None:
            unfinished = unfinished_batches(self.trainer)
            batches = loader.batches - unfinished
            windows = max(0, loader.windows - unfinished * share.windows)
            position = Position(loader.epoch, batches, windows)
            limit = len(loader) if self.trainer is None else self.trainer.num_training_batches
            if batches >= limit:
                position = Position(loader.epoch + 1, 0, 0)
        return {**self._identity(), **share._asdict(), **position._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the first window that the run of the checkpoint has not seen.

        The number of ranks and the batch size may differ: a line of the log then says so. Outside
        of `fit` only the tokenizer has to match.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If the data differ from those of the checkpoint, with every difference.
        """
        fitting = self.trainer is None or self.trainer.state.fn == "fit"
        check_same_data(state_dict, self._identity(), fitting=fitting)
        if fitting:
            self._position, self._saved_share = saved_position(state_dict)
            self._train_loader = None

    @property
    def _test_split(self) -> Split:
        return "test" if self.test_fraction else "val"

    def _tokens(self) -> TokenFile:
        if self._token_file is None:
            self._token_file = open_splits(
                self.files,
                self._given_tokenizer,
                val_fraction=self.val_fraction,
                test_fraction=self.test_fraction,
                cache_dir=self.cache_dir,
                num_workers=self.num_workers,
            )
        return self._token_file

    def _size(self, split: Split) -> SplitSize:
        return self._tokens().sizes[self._test_split if split == "test" else split]

    def _evaluation_loader(self, split: Split) -> DataLoader[Batch]:
        windows = EvaluationWindows(self._tokens().span(split), self.context)
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            sampler=EvaluationSampler(windows, **self._ranks()),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),
        )

    def _ranks(self) -> dict[str, int]:
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return kwargs or {"num_replicas": 1, "rank": 0}

    def _share(self) -> Share:
        return Share(self._ranks()["num_replicas"], self.batch_size)

    def _identity(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.to_dict(),
            "context": self.context,
            "seed": self.seed,
            "train_tokens": self._tokens().sizes["train"].tokens,
        }


def _given_tokenizer(given: str | Tokenizer) -> Tokenizer | None:
    """Return the tokenizer, or None for "char", whose alphabet is that of the corpus."""
    if isinstance(given, Tokenizer):
        return given
    if given == "char":
        return None
    return ByteTokenizer() if given == "byte" else load_tokenizer(given)
