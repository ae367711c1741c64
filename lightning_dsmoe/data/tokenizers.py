"""The place where configurations and programs may name tokenizers; they live below the data."""

from lightning_dsmoe.tokenizers import ByteTokenizer as ByteTokenizer
from lightning_dsmoe.tokenizers import CharTokenizer as CharTokenizer
from lightning_dsmoe.tokenizers import HuggingFaceTokenizer as HuggingFaceTokenizer
from lightning_dsmoe.tokenizers import Tokenizer as Tokenizer
from lightning_dsmoe.tokenizers import load_tokenizer as load_tokenizer
