"""Answers and what is told of them: statistics, tables, figures, claims, the results page."""
