"""What a sparse model loses against all experts: measured, written down and checked again."""

from lightning_dsmoe.analysis.certificate.record import TextSource as TextSource
from lightning_dsmoe.analysis.certificate.record import certificate as certificate
