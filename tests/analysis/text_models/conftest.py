import pytest

from lightning_dsmoe.analysis.text_models import DecoderText, TransformersText
from tests.text_models import llama, small_decoder


@pytest.fixture
def decoder_text() -> DecoderText:
    return small_decoder()


@pytest.fixture
def llama_text() -> TransformersText:
    return llama()
