"""Plans of a trained model: their frontier, and the search for the one that fits a budget."""
