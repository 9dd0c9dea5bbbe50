"""Shows one step of minibatch gradient descent, example by example, with real numbers."""
