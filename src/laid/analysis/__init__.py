"""Looking into models: attention heads, spectra, why windows shrink, what inference costs."""
