"""What train_counterfactual.py is made of."""
