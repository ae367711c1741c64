"""How a model uses its experts, as one HTML page that needs nothing else.

Here belongs what the page shows: `utilization`, `drift`, `lift` and `sample_routing` measure,
`view` turns that into plain numbers and strings, and `page` renders the templates with them.
"""

from lightning_dsmoe.analysis.report.page import Report as Report
from lightning_dsmoe.analysis.report.page import report_page as report_page
