"""Evidence about trained models: how many experts they need, and what that costs."""

from lightning_dsmoe.analysis.evaluation import PlanResult as PlanResult
from lightning_dsmoe.analysis.evaluation import evaluate_plan as evaluate_plan
from lightning_dsmoe.analysis.held_out import HeldOut as HeldOut
from lightning_dsmoe.analysis.held_out import held_out as held_out
from lightning_dsmoe.analysis.plans.frontier import frontier as frontier
from lightning_dsmoe.analysis.plans.frontier import knee as knee
from lightning_dsmoe.analysis.plans.frontier import sweep_plans as sweep_plans
