"""The report: a folder of pictures on one page that opens anywhere, and the same as JSON."""

from data_tools.report.facts import Plan, gather
from data_tools.report.page import render
from data_tools.report.thumbnails import Thumbnails, make_thumbnails
from data_tools.report.tokens import Tokenizers, load_tokenizers

__all__ = ["Plan", "Thumbnails", "Tokenizers", "gather", "load_tokenizers", "make_thumbnails", "render"]
