"""Plan what to do with a model, put it on the model, and take it off again."""
