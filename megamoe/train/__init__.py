"""The life of one rank: the loop, what is done after each step, what is recorded."""
