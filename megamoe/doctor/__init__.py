"""What this machine has of what megamoe uses, and what it can do with it."""
