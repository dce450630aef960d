"""What a run leaves behind: checkpoints, metrics, coverage and lineage."""
