"""Reading from a trained model: text that goes on after a prompt, and what a text costs it."""
