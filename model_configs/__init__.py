"""One published model a file, its whole curriculum in it."""
