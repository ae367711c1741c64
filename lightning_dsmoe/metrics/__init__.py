"""Metrics of routing: how experts are used, and how many parameters run for a token.

Here belongs what is counted over tokens and reduced over ranks, as a function for one batch and,
where batches are accumulated, as a torchmetrics `Metric`; and the parameter counts they need.
"""

from typing import TYPE_CHECKING

from lightning_dsmoe.imports import imported_on_use
from lightning_dsmoe.metrics.active_parameters import ActiveShare as ActiveShare
from lightning_dsmoe.metrics.active_parameters import ActiveSums as ActiveSums
from lightning_dsmoe.metrics.active_parameters import active_masks as active_masks
from lightning_dsmoe.metrics.active_parameters import active_parameters as active_parameters
from lightning_dsmoe.metrics.expert_utilization import DEAD_SHARE as DEAD_SHARE
from lightning_dsmoe.metrics.expert_utilization import Utilization as Utilization
from lightning_dsmoe.metrics.expert_utilization import expert_utilization as expert_utilization
from lightning_dsmoe.metrics.parameter_counts import ParameterCounts as ParameterCounts
from lightning_dsmoe.metrics.parameter_counts import RoutedParameters as RoutedParameters
from lightning_dsmoe.metrics.parameter_counts import count_parameters as count_parameters
from lightning_dsmoe.metrics.routing_agreement import routing_agreement as routing_agreement
from lightning_dsmoe.metrics.utilization_figure import utilization_figure as utilization_figure

if TYPE_CHECKING:
    from lightning_dsmoe.metrics.active_parameters_metric import (
        ActiveParameters as ActiveParameters,
    )
    from lightning_dsmoe.metrics.expert_utilization_metric import (
        ExpertUtilization as ExpertUtilization,
    )

# Imported when first used: torchmetrics takes seconds, and imports transformers if it is there.
__getattr__ = imported_on_use(
    __name__,
    ActiveParameters="metrics.active_parameters_metric",
    ExpertUtilization="metrics.expert_utilization_metric",
)
