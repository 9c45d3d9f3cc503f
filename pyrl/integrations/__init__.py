"""Drop-in use inside other trainers: `trl`, `verl`, and Liger's call signature (`liger`)."""
