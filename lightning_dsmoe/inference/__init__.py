"""Sparse inference: a trained decoder that runs only the experts of a plan.

Here: building the model (`compilation`), the model (`sparse_model`, and `sparse_module` for models
that are no decoders), what it continues (`prompts`, `text`), generation and sampling of tokens.
`engine` runs the experts fast, `artifact` is the model's directory. Nothing here imports Lightning.
"""

from lightning_dsmoe.inference.compilation import compile_sparse as compile_sparse
from lightning_dsmoe.inference.compilation import load_sparse as load_sparse
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints as SwitchPoints
from lightning_dsmoe.inference.generation import generate as generate
from lightning_dsmoe.inference.generation import left_pad as left_pad
from lightning_dsmoe.inference.hub import upload_artifact as upload_artifact
from lightning_dsmoe.inference.sparse_model import SparseModel as SparseModel
from lightning_dsmoe.inference.sparse_module import SparseModule as SparseModule
from lightning_dsmoe.routing import SelectionPlan as SelectionPlan
from lightning_dsmoe.serialization.checkpoint import load_decoder as load_decoder
from lightning_dsmoe.serialization.pruning import Remaining as Remaining
from lightning_dsmoe.serialization.pruning import prune as prune
