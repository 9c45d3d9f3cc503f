"""One file per backend, each with the functions of `pyrl.ops.backend.Backend`."""
