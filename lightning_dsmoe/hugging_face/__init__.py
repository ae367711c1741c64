"""Models of transformers: into a decoder, and out of it."""

from lightning_dsmoe.hugging_face.export_hf import export_hf as export_hf
from lightning_dsmoe.hugging_face.import_hf import import_hf as import_hf
from lightning_dsmoe.hugging_face.import_hf import plan_of as plan_of
