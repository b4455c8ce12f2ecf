"""What is made from answers: statistics, tables, figures, claims, the results page."""
