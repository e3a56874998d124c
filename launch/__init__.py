"""From plan to running job: run folders, locks, local processes. Needs no torch."""
