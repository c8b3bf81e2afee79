"""Benchmarks: what lehr promises of its speed and its estimates, measured. They need a checkout."""
