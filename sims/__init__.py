"""What is measured: Monte Carlo experiments from raw data, synthetic and real."""
