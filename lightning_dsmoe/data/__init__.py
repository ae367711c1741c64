"""Text files as batches of token windows."""

from typing import TYPE_CHECKING

from lightning_dsmoe.imports import imported_on_use
from lightning_dsmoe.tokenizers import ByteTokenizer as ByteTokenizer
from lightning_dsmoe.tokenizers import CharTokenizer as CharTokenizer
from lightning_dsmoe.tokenizers import HuggingFaceTokenizer as HuggingFaceTokenizer
from lightning_dsmoe.tokenizers import Tokenizer as Tokenizer

if TYPE_CHECKING:
    from lightning_dsmoe.data.loader import batch_size as batch_size
    from lightning_dsmoe.data.loader import batch_tokens as batch_tokens
    from lightning_dsmoe.data.text import TextDataModule as TextDataModule

# Imported when first used, so that tokenizers and corpora can be had without loading Lightning.
__getattr__ = imported_on_use(
    __name__,
    TextDataModule="data.text",
    batch_size="data.loader",
    batch_tokens="data.loader",
)
