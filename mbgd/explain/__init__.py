"""How minibatch gradient descent updates the weights for each example, on real numbers."""
