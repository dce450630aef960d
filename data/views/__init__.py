"""How an example is shown to a model: clean, or masked in one of several replicas."""
