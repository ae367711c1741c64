"""Losses of routers, and of two predictions that are to agree."""

from lightning_dsmoe.losses.consistency import consistency_loss as consistency_loss
from lightning_dsmoe.losses.load_balancing import load_balancing_loss as load_balancing_loss
from lightning_dsmoe.losses.load_balancing import load_balancing_losses as load_balancing_losses
from lightning_dsmoe.losses.mutual_information import (
    mutual_information_loss as mutual_information_loss,
)
from lightning_dsmoe.losses.mutual_information import routing_entropies as routing_entropies
from lightning_dsmoe.losses.router_sums import entropy as entropy
from lightning_dsmoe.losses.router_z import router_z_loss as router_z_loss
from lightning_dsmoe.losses.routing_loss import RoutingLoss as RoutingLoss
from lightning_dsmoe.losses.routing_loss import RoutingLosses as RoutingLosses
