"""What every job would cost, told before anything runs."""
