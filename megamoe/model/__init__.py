"""What a recipe's model is made of."""
