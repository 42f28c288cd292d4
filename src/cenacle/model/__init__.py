"""From a checkpoint and a plan to a model of which each rank holds a part."""
