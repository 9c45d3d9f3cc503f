"""The parity certificate: every loss and option, on every backend, against the float64 oracle."""

from pyrl.certify.run import certify as certify
