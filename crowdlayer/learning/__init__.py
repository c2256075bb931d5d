"""The classifier, the crowd layer, the loop that trains them, and what can be said of the workers and the labels."""
