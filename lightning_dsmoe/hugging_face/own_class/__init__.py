"""A class of transformers for any decoder under any plan, written beside its weights."""

from lightning_dsmoe.hugging_face.own_class.register import (
    register_own_class as register_own_class,
)
from lightning_dsmoe.hugging_face.own_class.write import write_own_class as write_own_class
