"""What a run did, for people: report.html, report.md and a plot of its losses. Needs no torch."""
