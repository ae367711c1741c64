"""How a model uses its experts, as one HTML page that needs nothing else."""

from lightning_dsmoe.analysis.report.page import Report as Report
from lightning_dsmoe.analysis.report.page import report_page as report_page
