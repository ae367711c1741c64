"""Sparse inference: plans, the sparse model, 8-bit experts, generation and artifacts."""

from lightning_dsmoe.inference.compilation import compile_sparse as compile_sparse
from lightning_dsmoe.inference.compilation import load_sparse as load_sparse
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints as SwitchPoints
from lightning_dsmoe.inference.generation import generate as generate
from lightning_dsmoe.inference.generation import left_pad as left_pad
from lightning_dsmoe.inference.sparse_model import SparseModel as SparseModel
from lightning_dsmoe.routing import SelectionPlan as SelectionPlan
from lightning_dsmoe.serialization.checkpoint import load_decoder as load_decoder
from lightning_dsmoe.serialization.pruning import Remaining as Remaining
from lightning_dsmoe.serialization.pruning import prune as prune
