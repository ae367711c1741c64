"""Evidence about trained models: how many experts they need, and what that costs.

What measures a trained model on held-out data belongs here: `plans` finds which experts to run,
`certificate` says what a sparse model loses against all experts, `report` shows how experts are
used. Measures of a model in training belong to `metrics` and `callbacks`.
"""

from lightning_dsmoe.analysis.evaluation import PlanResult as PlanResult
from lightning_dsmoe.analysis.evaluation import evaluate_plan as evaluate_plan
from lightning_dsmoe.analysis.held_out import HeldOut as HeldOut
from lightning_dsmoe.analysis.held_out import held_out as held_out
from lightning_dsmoe.analysis.measured import MeasuredBatches as MeasuredBatches
from lightning_dsmoe.analysis.measured import MeasuredText as MeasuredText
from lightning_dsmoe.analysis.plans.calibration import Calibration as Calibration
from lightning_dsmoe.analysis.plans.calibration import calibrate as calibrate
from lightning_dsmoe.analysis.plans.frontier import frontier as frontier
from lightning_dsmoe.analysis.plans.frontier import knee as knee
from lightning_dsmoe.analysis.plans.frontier import sweep as sweep
from lightning_dsmoe.analysis.plans.frontier import sweep_plans as sweep_plans
from lightning_dsmoe.analysis.plans.search import PlanSearch as PlanSearch
from lightning_dsmoe.analysis.text_models import DecoderText as DecoderText
from lightning_dsmoe.analysis.text_models import Scorer as Scorer
from lightning_dsmoe.analysis.text_models import TextLoss as TextLoss
from lightning_dsmoe.analysis.text_models import TextModel as TextModel
from lightning_dsmoe.analysis.text_models import TransformersText as TransformersText
from lightning_dsmoe.analysis.text_models import harness_model as harness_model
from lightning_dsmoe.analysis.text_models import text_loss as text_loss
