"""What a sparse model loses against all experts: measured, written down and checked again.

`judgement` measures, with `losses` of windows and errors of `mixtures`; `comparison` does for any
model. `record` writes the certificate, `reading` reads one of unknown origin, `check` compares it
with a new measurement.
"""

from lightning_dsmoe.analysis.certificate.comparison import Comparison as Comparison
from lightning_dsmoe.analysis.certificate.comparison import compare_with_dense as compare_with_dense
from lightning_dsmoe.analysis.certificate.record import TextSource as TextSource
from lightning_dsmoe.analysis.certificate.record import certificate as certificate
