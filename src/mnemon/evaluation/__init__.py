"""Measuring what a model answers: BABILong runner, scores, statistics, tables, plots and the report page."""
