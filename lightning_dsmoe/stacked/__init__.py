"""Weights of many experts in one tensor, and the products with all or some of them."""

from lightning_dsmoe.stacked.dispatch import tokens_of_each_expert as tokens_of_each_expert
from lightning_dsmoe.stacked.dispatch import worth_sorting as worth_sorting
from lightning_dsmoe.stacked.projection import gated_projection as gated_projection
from lightning_dsmoe.stacked.weight import StackedWeight as StackedWeight
