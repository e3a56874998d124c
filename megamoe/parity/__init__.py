"""Does every layout train the same model? Each of a list against one process, number by number."""
