"""From a checkpoint and a plan to the model of which each rank holds a part."""
