"""The directory of a sparse model: files, hashes, certificate and model card."""

from lightning_dsmoe.inference.artifact.directory import Artifact as Artifact
from lightning_dsmoe.inference.artifact.directory import check_files as check_files
from lightning_dsmoe.inference.artifact.directory import check_free as check_free
from lightning_dsmoe.inference.artifact.directory import read_artifact as read_artifact
from lightning_dsmoe.inference.artifact.directory import write_artifact as write_artifact
