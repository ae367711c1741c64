"""The directory of a sparse model: its files, their hashes, the certificate, the model card.

It is read as a stranger's: data only, with every size and hash verified before it is used.
"""

from lightning_dsmoe.inference.artifact.directory import Artifact as Artifact
from lightning_dsmoe.inference.artifact.directory import check_files as check_files
from lightning_dsmoe.inference.artifact.directory import check_free as check_free
from lightning_dsmoe.inference.artifact.directory import read_artifact as read_artifact
from lightning_dsmoe.inference.artifact.directory import write_artifact as write_artifact
