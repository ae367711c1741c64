"""Lightning callbacks that control, measure and compile models with routed layers."""

from lightning_dsmoe.callbacks.expert_utilization_monitor import (
    ExpertUtilizationMonitor as ExpertUtilizationMonitor,
)
from lightning_dsmoe.callbacks.mi_weight_annealing import MIWeightAnnealing as MIWeightAnnealing
from lightning_dsmoe.callbacks.router_collapse import RouterCollapseAlarm as RouterCollapseAlarm
from lightning_dsmoe.callbacks.skip_non_finite_steps import (
    SkipNonFiniteSteps as SkipNonFiniteSteps,
)
from lightning_dsmoe.callbacks.sparse_compile import SparseCompile as SparseCompile
from lightning_dsmoe.callbacks.sparse_evaluation import SparseEvaluation as SparseEvaluation
from lightning_dsmoe.callbacks.sparse_evaluation import SparseResult as SparseResult
from lightning_dsmoe.callbacks.sparse_finishing import SparseFinishing as SparseFinishing
from lightning_dsmoe.callbacks.sparsity_target import SparsityTarget as SparsityTarget
from lightning_dsmoe.callbacks.throughput_monitor import ThroughputMonitor as ThroughputMonitor
from lightning_dsmoe.moved import renamed_objects
from lightning_dsmoe.routing import SelectionPlan

__getattr__ = renamed_objects(__name__, LayerSelections=SelectionPlan)
