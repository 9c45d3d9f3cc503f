"""The parity certificate: every loss and option, on every backend, against float64."""
