"""Routers, what they return, and the selections that decide which experts run."""

from lightning_dsmoe.routing.plan import SelectionPlan as SelectionPlan
from lightning_dsmoe.routing.routed_layer import OutputOnly as OutputOnly
from lightning_dsmoe.routing.routed_layer import RoutedLayer as RoutedLayer
from lightning_dsmoe.routing.routed_layer import routed_layers as routed_layers
from lightning_dsmoe.routing.router import CosineRouter as CosineRouter
from lightning_dsmoe.routing.router import LinearRouter as LinearRouter
from lightning_dsmoe.routing.router import MLPRouter as MLPRouter
from lightning_dsmoe.routing.router import Router as Router
from lightning_dsmoe.routing.routing import MixtureOutput as MixtureOutput
from lightning_dsmoe.routing.routing import Routing as Routing
from lightning_dsmoe.routing.routing import Routings as Routings
from lightning_dsmoe.routing.running import RoutingRecord as RoutingRecord
from lightning_dsmoe.routing.running import record_routings as record_routings
from lightning_dsmoe.routing.running import run_plan as run_plan
from lightning_dsmoe.routing.selection import AllExperts as AllExperts
from lightning_dsmoe.routing.selection import Gates as Gates
from lightning_dsmoe.routing.selection import Selection as Selection
from lightning_dsmoe.routing.selection import Threshold as Threshold
from lightning_dsmoe.routing.selection import ThresholdTopK as ThresholdTopK
from lightning_dsmoe.routing.selection import TopK as TopK
from lightning_dsmoe.routing.selection import TopP as TopP
