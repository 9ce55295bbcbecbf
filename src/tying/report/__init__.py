"""A self-contained page with the pictures."""

from tying.report.data import ReportData
from tying.report.page import report

__all__ = ["ReportData", "report"]
