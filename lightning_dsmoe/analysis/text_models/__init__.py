"""Text under a plan: scored and continued by models of this library and of transformers.

`TextModel` is a model with its tokenizer, `Scorer` runs it in batches under a plan and measures the
active share, `text_loss` and `harness_model` measure with it.
"""

from lightning_dsmoe.analysis.text_models.decoder_text import DecoderText as DecoderText
from lightning_dsmoe.analysis.text_models.harness import harness_model as harness_model
from lightning_dsmoe.analysis.text_models.scorer import Score as Score
from lightning_dsmoe.analysis.text_models.scorer import Scorer as Scorer
from lightning_dsmoe.analysis.text_models.text_loss import TextLoss as TextLoss
from lightning_dsmoe.analysis.text_models.text_loss import text_loss as text_loss
from lightning_dsmoe.analysis.text_models.text_model import Continuing as Continuing
from lightning_dsmoe.analysis.text_models.text_model import TextModel as TextModel
from lightning_dsmoe.analysis.text_models.transformers_text import (
    TransformersText as TransformersText,
)
from lightning_dsmoe.analysis.text_models.windows import Window as Window
