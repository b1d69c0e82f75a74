"""Looking into a memory: recorders put what happened into a typed trace; pages are made from traces alone."""
