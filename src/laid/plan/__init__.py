"""What every job would cost, before anything runs."""
