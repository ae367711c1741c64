"""Text files as batches of token windows."""

from lightning_dsmoe.data.loader import batch_size as batch_size
from lightning_dsmoe.data.loader import batch_tokens as batch_tokens
from lightning_dsmoe.data.text import TextDataModule as TextDataModule
from lightning_dsmoe.tokenizers import ByteTokenizer as ByteTokenizer
from lightning_dsmoe.tokenizers import CharTokenizer as CharTokenizer
from lightning_dsmoe.tokenizers import HuggingFaceTokenizer as HuggingFaceTokenizer
from lightning_dsmoe.tokenizers import Tokenizer as Tokenizer
