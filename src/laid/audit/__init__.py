"""From a number back to the image files: lineage, verify, explain, rebuild."""
