"""Which sequences a step sees: a function of seed and epoch, whatever the number of processes."""
