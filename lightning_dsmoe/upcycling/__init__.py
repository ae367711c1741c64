"""Dense models as mixtures of experts."""

from lightning_dsmoe.upcycling.dense_mlp import DenseMLP as DenseMLP
from lightning_dsmoe.upcycling.directory import load_upcycled as load_upcycled
from lightning_dsmoe.upcycling.directory import save_upcycled as save_upcycled
from lightning_dsmoe.upcycling.upcycle import upcycle as upcycle
